"""The registry: which workers live, and what they serve.

A worker of a newer release may announce more than is known here: what is not known is passed over.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
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
from shared.clock import BrokerClock
from shared.contract import EngineName, Feature, Kind
from shared.limits import Limits

AFTER_0_1_0 = {"limits", "quiet_seconds", "ready", "loading", "weights"}
"""What readers of 0.1.0 do not know: they refuse an announcement that has it, so it is kept beside it."""

PASSING = {"in_flight", "quiet_seconds", "age_ms"}
"""What of an announcement is different each time; whoever chooses an engine does not go by it."""

WHOLE_SECONDS = 60.0
"""After how long all announcements are read again, whatever is known of what has changed: a broker that took over from
another may have another clock, or lack what was written last."""

KEYS = (keys.WORKERS_SEEN, keys.WORKERS_INFO, keys.WORKERS_MORE, keys.WORKERS_DIGESTS, keys.WORKERS_CHANGED)
"""What the registry is kept in."""


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


class Weights(Announced):
    """What the files of a loaded model are: a digest, and when one was changed last (seconds since the epoch)."""

    digest: str
    changed: float


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
    loads what it needs before it takes requests: they may wait for it. ``weights`` are by engine those of its loaded
    models.
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
    weights: dict[str, dict[str, Weights]] = {}
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


@dataclass(frozen=True, slots=True)
class Changes:
    """What has changed of the live workers, or, where it is the ``whole``, all of them.

    ``stamp`` says up to when; ``gone`` are the ids of those that left or fell silent.
    """

    stamp: str
    whole: bool
    gone: frozenset[str]
    workers: dict[str, WorkerInfo]

    @property
    def now(self) -> float:
        """The broker's time then, to the millisecond, in seconds since the epoch."""
        return (int(self.stamp.partition(":")[2]) + 0.5) / 1000


class WorkerRegistry:
    """Announce a worker and list those that live. The ``clock`` learns from the broker's answers."""

    def __init__(
        self, client: redis.Redis, silent_after_seconds: float = 8.0, clock: BrokerClock | None = None
    ) -> None:
        self._clock = clock or BrokerClock()
        self._silent_ms = int(silent_after_seconds * 1000)
        self._announce = client.register_script(lua("shared", "announce"))
        self._live = client.register_script(lua("shared", "live"))

    def announce(self, worker: WorkerInfo, since: str = "") -> Changes:
        """Say that ``worker`` lives; workers that fell silent are dropped on the way. Returns :meth:`changes`."""
        info, more = worker.model_dump_json(exclude=AFTER_0_1_0), worker.model_dump_json(include=AFTER_0_1_0)
        lasting = hashlib.sha256(worker.model_dump_json(exclude=PASSING).encode()).hexdigest()
        args = [worker.id, info, self._silent_ms, more, lasting, int(2 * WHOLE_SECONDS * 1000), since]
        return self._heard(self._announce, args)

    def leave(self, worker_id: str) -> None:
        """Take a worker out at once."""
        self._announce(keys=KEYS, args=[worker_id, "", self._silent_ms])

    def changes(self, since: str = "") -> Changes:
        """What has changed since a stamp; all where that is empty, or nobody has kept it."""
        return self._heard(self._live, [self._silent_ms, since])

    def _heard(self, script: Callable[..., Any], args: Sequence[Any]) -> Changes:
        asked = self._clock.steady()
        found = changes_of(script(keys=KEYS, args=args))
        self._clock.learn(found.now, asked, self._clock.steady())
        return found

    def live(self) -> list[WorkerInfo]:
        """Workers that announced themselves within the time of silence, the longest running first."""
        return in_order(self.changes().workers)


class KnownWorkers:
    """The live workers for who asks again and again: what was known, and what has changed since. Asks nobody itself.

    What passes (:data:`PASSING`) is as of when all was read last. From any thread.
    """

    def __init__(self) -> None:
        self._known: tuple[str, dict[str, WorkerInfo]] = ("", {})
        self._whole_at = float("-inf")

    @property
    def since(self) -> str:
        """The stamp to ask with."""
        return self._known[0] if time.monotonic() - self._whole_at < WHOLE_SECONDS else ""

    def take(self, found: Changes) -> list[WorkerInfo]:
        """Take in what has changed; returns those that live now, the longest running first."""
        left = self._known[1]
        if found.whole:
            left, self._whole_at = {}, time.monotonic()
        left = {name: worker for name, worker in left.items() if name not in found.gone}
        self._known = found.stamp, {**left, **found.workers}
        return in_order(self._known[1])


class Roster:
    """The live workers for who asks again and again: the broker is asked for what has changed. From any thread."""

    def __init__(self, registry: WorkerRegistry) -> None:
        self._registry = registry
        self._known = KnownWorkers()

    def read(self) -> list[WorkerInfo]:
        """Those that live now, the longest running first."""
        return self._known.take(self._registry.changes(self._known.since))

    def announce(self, worker: WorkerInfo) -> list[WorkerInfo]:
        """Say that ``worker`` lives; returns the same."""
        return self._known.take(self._registry.announce(worker, self._known.since))


def changes_of(answer: tuple[bytes, int, list[bytes], list[Any]]) -> Changes:
    """What a script of ``roster.lua`` has answered."""
    stamp, whole, gone, rows = answer
    workers = {
        worker.decode(): WorkerInfo.model_validate(
            {**orjson.loads(info), **orjson.loads(more or "{}"), "age_ms": max(0, int(age))}
        )
        for worker, age, info, more in zip(rows[::4], rows[1::4], rows[2::4], rows[3::4], strict=True)
    }
    return Changes(stamp.decode(), bool(whole), frozenset(worker.decode() for worker in gone), workers)


def in_order(workers: Mapping[str, WorkerInfo]) -> list[WorkerInfo]:
    """These workers, the longest running first."""
    return sorted(workers.values(), key=lambda worker: worker.started)
