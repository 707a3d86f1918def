"""The registry: which workers live, and what they serve."""

from __future__ import annotations

from collections.abc import Collection

import orjson
import redis

from shared import keys
from shared.broker import lua
from shared.contract import EngineName, Feature, Kind, Value
from shared.limits import Limits


class ServedModel(Value):
    """A model that a worker can run, and the kinds it answers with it.

    ``parity`` is what came of holding its answers to the reference; ``notes`` what an operator should know of it.
    """

    kinds: tuple[Kind, ...]
    loaded: bool = False
    parity: str = ""
    notes: tuple[str, ...] = ()


class EngineInfo(Value):
    """One engine of a worker. ``failed`` names the models that it cannot answer with now, and why."""

    name: EngineName
    features: tuple[Feature, ...] = ()
    models: dict[str, ServedModel] = {}
    max_batch_size: int = 1
    failed: dict[str, str] = {}


class WorkerInfo(Value):
    """What a worker announces. ``age_ms`` is the time since it last did.

    ``limits`` are those that it keeps to now. ``gpus`` are the uuids of the GPUs it has leased, ``gpu_problems`` says
    of those that failed why.
    """

    id: str
    host: str
    pid: int
    started: float
    queues: tuple[str, ...]
    engines: tuple[EngineInfo, ...] = ()
    in_flight: int = 0
    limits: Limits | None = None
    gpus: tuple[str, ...] = ()
    gpu_problems: dict[str, str] = {}
    age_ms: int = 0

    def serves(self, engine: EngineName, model: str, kind: Kind, features: Collection[Feature] = ()) -> bool:
        """Whether this worker can answer a request of this kind for this model with this engine."""
        return any(
            info.name is engine
            and model in info.models
            and kind in info.models[model].kinds
            and set(features) <= set(info.features)
            for info in self.engines
        )


class WorkerRegistry:
    """Announce a worker and list those that live."""

    def __init__(self, client: redis.Redis, silent_after_seconds: float = 8.0) -> None:
        self._silent_ms = int(silent_after_seconds * 1000)
        self._announce = client.register_script(lua("shared", "announce"))
        self._live = client.register_script(lua("shared", "live"))
        self._keys = [keys.WORKERS_SEEN, keys.WORKERS_INFO]

    def announce(self, worker: WorkerInfo) -> None:
        """Say that ``worker`` lives; workers that fell silent are dropped on the way."""
        self._announce(keys=self._keys, args=[worker.id, worker.model_dump_json(), self._silent_ms])

    def leave(self, worker_id: str) -> None:
        """Take a worker out at once."""
        self._announce(keys=self._keys, args=[worker_id, "", self._silent_ms])

    def live(self) -> list[WorkerInfo]:
        """Workers that announced themselves within the time of silence, the longest running first."""
        rows = self._live(keys=self._keys, args=[self._silent_ms])
        workers = [
            WorkerInfo.model_validate({**orjson.loads(info), "age_ms": max(0, int(age))})
            for age, info in zip(rows[::2], rows[1::2], strict=True)
        ]
        return sorted(workers, key=lambda worker: worker.started)
