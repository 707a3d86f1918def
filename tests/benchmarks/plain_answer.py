"""What the yardsticks of the queue benchmark compute: the fake engine's answer, in a result of our shape and size."""

from __future__ import annotations

from typing import Any

from shared.contract import InferenceRequest
from workers.engines.base import EngineOutput
from workers.engines.fake import answer


def plain_answer(request: dict[str, Any]) -> dict[str, Any]:
    """Validate a request as we do, and answer it as the fake engine does."""
    output = answer(InferenceRequest.parse(request))
    if not isinstance(output, EngineOutput):
        raise output
    return {
        "outputs": output.outputs, "engine_used": "fake", "latency_ms": 0.0, "batch_size": 1, "cache_hit": False,
        "metadata": {
            "model": request["model"], "worker": "plain", "hops": [],
            "timing": {"queued_ms": 0.0, "batched_ms": 0.0, "prefill_ms": 0.0, "decode_ms": 0.0, "engine_ms": 0.0},
            "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
        },
    }  # fmt: skip
