"""The thread of an engine outlives whatever its engine raises."""

from __future__ import annotations

import asyncio

import pytest

from shared.contract import EngineName, InferenceRequest
from shared.errors import EngineError
from tests.support.items import whole
from tests.support.memory_worker import settings_of
from workers.engines.fake import FakeEngine, FakeModel
from workers.models.manager import ModelManager
from workers.path.batcher import Batch, FlushReason
from workers.path.runner import BatchDone, BatchRunner, Event, Finished
from workers.requests.inflight import InFlight


class Unspeakable(Exception):
    """Has no text."""

    def __str__(self) -> str:
        raise ValueError("no text")


@pytest.mark.parametrize("problem", [SystemExit(1), asyncio.CancelledError(), Unspeakable()])
def test_whatever_an_engine_raises_is_its_requests_outcome(monkeypatch, problem: BaseException) -> None:
    """Also what is no ``Exception``, and what has no text; the next batch is answered."""
    settings = settings_of(EngineName.FAKE)
    reports: list[Event] = []
    runner = BatchRunner(ModelManager(FakeEngine(settings), settings), reports.append)
    batches = []
    for number in range(2):
        item = InFlight(str(number), "fake", {}, {}, "", 1.0)
        item.request = InferenceRequest.parse({"model": "echo", "inputs": {"prompt": f"prompt {number}"}})
        batches.append(Batch("echo", [whole(item)], 1, FlushReason.SIZE, 0.0))
    infer, failures = FakeModel.infer, [problem]

    def fails_once(model: FakeModel, requests, emit) -> None:
        if failures:
            raise failures.pop()
        infer(model, requests, emit)

    monkeypatch.setattr(FakeModel, "infer", fails_once)
    for batch in batches:
        runner.submit(batch)
    runner.start(preload=[])

    assert runner.stop(timeout=60)
    first, second = [event for event in reports if isinstance(event, Finished)]
    assert isinstance(first.outcome, EngineError)
    assert type(problem).__name__ in str(first.outcome)
    assert second.outcome.outputs["text"] == "1 tpmorp"
    assert [event.batch for event in reports if isinstance(event, BatchDone)] == batches
