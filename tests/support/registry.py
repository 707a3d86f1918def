"""What a worker says of itself, made up."""

from __future__ import annotations

from shared.contract import EngineName, Kind
from shared.registry import EngineInfo, ServedModel, WorkerInfo


def worker(
    *engines: EngineName, model: str = "m", kinds: tuple[Kind, ...] = (Kind.GENERATE,), ready: bool = True
) -> WorkerInfo:
    """A live worker with these engines and one model."""
    served = {model: ServedModel(kinds=kinds)}
    return WorkerInfo(
        id="w", host="h", pid=1, started=0.0, queues=tuple(engines), ready=ready,
        engines=tuple(EngineInfo(name=engine, models=served) for engine in engines),
    )  # fmt: skip
