"""The result of a request, as its caller sees it. Pure."""

from __future__ import annotations

from typing import Any

from shared.contract import EngineName
from workers.engines.base import EngineOutput
from workers.requests.inflight import InFlight
from workers.requests.rows import Rows


def result_of(
    item: InFlight, rows: Rows, output: EngineOutput, engine: EngineName, worker_id: str, now: float
) -> dict[str, Any]:
    """The fields of :class:`shared.contract.InferenceResult`; ``now`` is in seconds since the epoch."""
    usage = output.usage
    return {
        "outputs": output.outputs,
        "engine_used": engine,
        "latency_ms": _ms(now - item.sent),
        "batch_size": rows.batch_size,
        "cache_hit": output.cache_hit,
        "metadata": {
            **output.metadata,
            "model": rows.request.model,
            "worker": worker_id,
            "timing": {
                "queued_ms": _ms(item.claimed - item.sent),
                "batched_ms": _ms(item.started - item.claimed),
                **({"first_token_ms": _ms(item.first_token - item.started)} if item.first_token else {}),
                "prefill_ms": _ms(output.prefill_ms / 1000),
                "decode_ms": _ms(output.decode_ms / 1000),
                "engine_ms": _ms(rows.ran_ms / 1000),
            },
            "usage": {
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            },
            "hops": [hop.model_dump(mode="json") for hop in item.hops] if item.hops else [],
        },
    }


def _ms(seconds: float) -> float:
    """To whole microseconds, which is twice as fast as rounding."""
    return int(seconds * 1e6) / 1e3 if seconds > 0 else 0.0
