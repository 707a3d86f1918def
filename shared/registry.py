"""The registry: which workers live, and what they serve.

A worker of a newer release may announce more than is known here: what is not known is passed over.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum
from typing import Annotated, Any

import orjson
import redis
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from shared import keys
from shared.broker import lua
from shared.contract import EngineName, Feature, Kind
from shared.limits import Limits

AFTER_0_1_0 = {"limits", "quiet_seconds", "ready", "loading"}
"""What readers of 0.1.0 do not know: they refuse an announcement that has it, so it is kept beside it."""


class Announced(BaseModel):
    """Base of what workers announce: immutable, and unknown fields are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")


def _known(names: type[StrEnum]) -> BeforeValidator:
    """Leave out what is not one of these names."""
    known = frozenset(map(str, names))
    return BeforeValidator(lambda values: tuple(value for value in values if value in known))


def _of_known_engines(engines: Any) -> Any:
    known = frozenset(map(str, EngineName))
    return tuple(info for info in engines if not isinstance(info, dict) or info.get("name") in known)


def _where_readable(value: Any, read: ValidatorFunctionWrapHandler) -> Any:
    """``None`` for what only a newer release can read: the worker counts all the same."""
    try:
        return read(value)
    except ValidationError:
        return None


class ServedModel(Announced):
    """A model that a worker can run, and the kinds it answers with it.

    ``parity`` is what came of holding its answers to the reference; ``notes`` what an operator should know of it.
    """

    kinds: Annotated[tuple[Kind, ...], _known(Kind)]
    loaded: bool = False
    parity: str = ""
    notes: tuple[str, ...] = ()


class EngineInfo(Announced):
    """One engine of a worker. ``failed`` names the models that it cannot answer with now, and why."""

    name: EngineName
    features: Annotated[tuple[Feature, ...], _known(Feature)] = ()
    models: dict[str, ServedModel] = {}
    max_batch_size: int = 1
    failed: dict[str, str] = {}


class WorkerInfo(Announced):
    """What a worker announces. ``age_ms`` is the time since it last did.

    ``gpus`` are the uuids of the GPUs it has leased, ``gpu_problems`` says of those that failed why. ``limits`` are
    those that it keeps to now; ``quiet_seconds`` is, for each engine that runs something, how long ago that has begun
    or made its last token. ``loading`` is, for each engine that loads one, the model. A worker that is not ``ready``
    loads what it needs before it takes requests: they may wait for it.
    """

    id: str
    host: str
    pid: int
    started: float
    queues: tuple[str, ...]
    engines: Annotated[tuple[EngineInfo, ...], BeforeValidator(_of_known_engines)] = ()
    in_flight: int = 0
    gpus: tuple[str, ...] = ()
    gpu_problems: dict[str, str] = {}
    limits: Annotated[Limits | None, WrapValidator(_where_readable)] = None
    quiet_seconds: dict[str, float] = {}
    ready: bool = True
    loading: dict[str, str] = {}
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
        self._keys = [keys.WORKERS_SEEN, keys.WORKERS_INFO, keys.WORKERS_MORE]

    def announce(self, worker: WorkerInfo) -> None:
        """Say that ``worker`` lives; workers that fell silent are dropped on the way."""
        info, more = worker.model_dump_json(exclude=AFTER_0_1_0), worker.model_dump_json(include=AFTER_0_1_0)
        self._announce(keys=self._keys, args=[worker.id, info, self._silent_ms, more])

    def leave(self, worker_id: str) -> None:
        """Take a worker out at once."""
        self._announce(keys=self._keys, args=[worker_id, "", self._silent_ms, ""])

    def live(self) -> list[WorkerInfo]:
        """Workers that announced themselves within the time of silence, the longest running first."""
        rows = self._live(keys=self._keys, args=[self._silent_ms])
        workers = [
            WorkerInfo.model_validate({**orjson.loads(info), **orjson.loads(more or "{}"), "age_ms": max(0, int(age))})
            for age, info, more in zip(rows[::3], rows[1::3], rows[2::3], strict=True)
        ]
        return sorted(workers, key=lambda worker: worker.started)
