"""What the control worker looks for."""

from __future__ import annotations

from shared.contract import EngineName
from tests.support.registry import worker
from workers.control.watch import stranded


def test_queues_with_messages_and_no_worker_are_found() -> None:
    """A queue that waits for nobody is named; empty ones and served ones are not."""
    waiting = {EngineName.VLLM: 3, EngineName.ONNX: 2, EngineName.PYTORCH: 0}

    assert stranded(waiting, [worker(EngineName.ONNX)]) == {EngineName.VLLM: 3}
