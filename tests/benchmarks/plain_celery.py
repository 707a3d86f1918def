"""Plain Celery doing what the fake engine does: the yardstick of the queue benchmark."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery

from shared.contract import InferenceRequest
from workers.engines.base import EngineOutput
from workers.engines.fake import answer

url = os.environ["REDIS_URL"]
app = Celery("plain", broker=url, backend=url)
app.conf.task_default_queue = "plain"


@app.task(name="plain.infer")
def infer(request: dict[str, Any]) -> dict[str, Any]:
    """The fake answer, in a result of the same shape and size."""
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
