"""An engine on a thread of its own: takes work, reports each request's outcome as soon as it is known.

:class:`BatchRunner` runs one batch after the other; :class:`ContinuousRunner` hands requests to an engine that batches
by itself. Either also brings a model back when its rest is over.
"""

from __future__ import annotations

import logging
import queue
import sys
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from shared.contract import InferenceRequest
from shared.errors import AnswerTooLarge, BadRequest, EngineError, EngineOutOfMemory, FleetError
from workers.engines.base import ContinuousModel, EngineOutput, LoadedModel
from workers.engines.common.quotes import discreet, told, traceback_of
from workers.models.manager import ModelManager
from workers.path.batcher import Batch
from workers.path.progress import Made, Progress
from workers.requests.inflight import InFlight
from workers.requests.rows import Part
from workers.requests.sizes import least_answer_bytes

logger = logging.getLogger(__name__)

Result = EngineOutput | FleetError


class Finished(NamedTuple):
    """What came of a part of a request, after running for ``ran_ms`` (without loading) in a batch of that many."""

    part: Part
    outcome: Result
    batch_size: int
    ran_ms: float

    @property
    def item(self) -> InFlight:
        """The request."""
        return self.part.item


@dataclass(frozen=True, slots=True)
class BatchDone:
    """All members of a batch are through. ``seconds`` is how long it ran: loading its model is no part of that."""

    batch: Batch[Part]
    seconds: float


@dataclass(frozen=True, slots=True)
class TokensMade:
    """So many more tokens were made of each of these requests, in one step of the engine."""

    made: Made


@dataclass(frozen=True, slots=True)
class ModelsChanged:
    """What the engine can be asked has changed: the registry should know."""


class _Signal(Enum):
    STOP = "stop"
    LOOK = "look"  # a model has begun to rest: there is a time to wake up at


Event = Finished | BatchDone | TokensMade | ModelsChanged
Report = Callable[[Event], None]


class EngineRunner(ABC):
    """The thread of an engine. ``report`` is called on it, or on a thread of the engine, and must not block.

    Tokens are reported where somebody ``listens`` to them; ``clock`` tells seconds since the epoch.
    """

    def __init__(
        self,
        models: ModelManager,
        report: Report,
        listens: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.models = models
        self.progress = Progress(lambda made: report(TokensMade(made)), listens, clock)
        self._report = report
        self._inbox: queue.SimpleQueue[Batch[Part] | _Signal] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"engine-{models.engine.name}", daemon=True)
        self._preload: Sequence[str] = ()
        self._loading = 0.0
        self.loaded = threading.Event()
        models.on_change = self._changed
        models.on_tokens = self.progress.tell

    @property
    def slots(self) -> int:
        """How many batches run side by side."""
        return self.models.engine.slots or 1

    @property
    def continuous(self) -> bool:
        """Whether the engine batches by itself, so that requests are to be given to it one by one."""
        return self.models.engine.slots is not None

    @property
    def frames(self) -> str:
        """Where the thread is now, without what it works on."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        return "".join(traceback.format_stack(frame)) if frame is not None else ""

    def start(self, preload: Sequence[str]) -> None:
        """Start the thread; ``preload`` is loaded first and :attr:`loaded` is set after it."""
        self._preload = preload
        self._thread.start()

    def submit(self, batch: Batch[Part]) -> None:
        """Queue a batch."""
        self._inbox.put(batch)

    def abort(self, item: InFlight) -> None:
        """The answer to a running request is not wanted any longer."""
        request = item.request
        model = self.models.find(request.model) if request is not None else None
        if request is not None and model is not None:
            model.abort(request.id)

    def stop(self, timeout: float) -> bool:
        """Let the current batch finish, unload, and end the thread; ``False`` if it is still running after that."""
        self._inbox.put(_Signal.STOP)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        for name in self._preload:
            with suppress(FleetError):  # it is logged and announced; requests for it go to other engines
                self.models.get(name)
        self.loaded.set()
        while True:
            due = self.models.revive_at()
            if time.monotonic() >= due:
                self.models.revive()
                self._report(ModelsChanged())
                continue
            try:
                batch = self._inbox.get(timeout=None if due == float("inf") else max(0.0, due - time.monotonic()))
            except queue.Empty:
                continue
            if batch is _Signal.STOP:
                break
            if isinstance(batch, Batch):
                self._accept(batch)
        self.models.close()

    @abstractmethod
    def _accept(self, batch: Batch[Part]) -> None:
        """Run a batch, or let it run."""

    def _ready(self, parts: Sequence[Part]) -> LoadedModel:
        """The model, loaded where it was not: then the run of these begins, or goes on.

        :attr:`_loading` grows by the seconds that it took.
        """
        started = time.monotonic()
        try:
            return self.models.get(_model_of(parts[0]))
        finally:
            now = time.monotonic()
            self._loading += now - started
            for part in parts:
                part.item.began = part.item.began + now - started if part.item.began else now

    def _refused(self, part: Part, model: LoadedModel) -> FleetError | None:
        """Why a request of several parts is not to begin: what can be known before any of it has run."""
        request, most = part.rows.request, self.models.limits.now.max_result_bytes
        least = least_answer_bytes(request, model.dimensions)
        if least > most:
            return AnswerTooLarge(
                f"the answer would be {least} bytes at least; at most {most} are kept (fleet.max_result_bytes)"
            )
        try:
            model.check(request)
        except FleetError as error:
            return error
        return None

    def _finish(self, part: Part, outcome: Result, batch_size: int, started: float) -> None:
        self.progress.step()
        name = _model_of(part)
        if isinstance(outcome, EngineOutput):
            self.models.succeeded(name)
        elif outcome.hops:
            self.models.failed(name, outcome)
        self._report(Finished(part, outcome, batch_size, (time.perf_counter() - started) * 1000))

    def _changed(self) -> None:
        """A model has begun to rest: the fleet should know, and the thread has a time to wake up at."""
        self._report(ModelsChanged())
        self._inbox.put(_Signal.LOOK)

    def _wrapped(self, error: BaseException, parts: Sequence[Part]) -> FleetError:
        """An engine's exception as an error of ours, which does not quote what the engine was given."""
        requests, engine = _requests(parts), self.models.engine.name
        try:
            if isinstance(error, FleetError):
                return discreet(error, requests)
            logger.error("the %s engine failed\n%s", engine, traceback_of(error, requests))
            return EngineError(f"{engine}: {told(error, requests)}")
        except Exception:  # noqa: BLE001  # an exception whose text cannot be had
            return EngineError(f"{engine}: {type(error).__name__}")


class BatchRunner(EngineRunner):
    """Runs batches one after the other."""

    def _accept(self, batch: Batch[Part]) -> None:
        started, self._loading = time.perf_counter(), 0.0
        items = [part.item for part in batch.items]
        self.progress.begin(items)
        self._attempt(_model_of(batch.items[0]), batch.items, len(batch.items))
        self.progress.end(items)
        self._report(BatchDone(batch, time.perf_counter() - started - self._loading))

    def _attempt(self, name: str, parts: Sequence[Part], batch_size: int) -> None:
        """Run ``parts`` together. When the engine fails on all, run fewer at once: the bad one fails alone."""
        started = time.perf_counter()
        unanswered = dict(enumerate(parts))

        def emit(index: int, outcome: Result) -> None:
            part = unanswered.get(index)
            if part is None:
                raise EngineError(f"member {index} of {len(parts)} was answered twice, or is not there")
            self._finish(part, _discreet(outcome, part), batch_size, started)
            del unanswered[index]

        error: FleetError
        try:
            model = self._ready(parts)
            started = time.perf_counter()
            for index, part in enumerate(parts):
                if part.opens and (refusal := self._refused(part, model)) is not None:
                    emit(index, refusal)
            given = list(unanswered)
            if given:
                model.infer([parts[index].request for index in given], lambda at, outcome: emit(given[at], outcome))
            if not unanswered:
                return
            error = EngineError(f"the {self.models.engine.name} engine left {len(unanswered)} members unanswered")
        except BaseException as raised:  # noqa: BLE001  # the boundary: whatever an engine raises is an outcome
            error = self._wrapped(raised, parts)
        left = list(unanswered.values())
        if error.outage or not error.hops:
            smaller: list[list[Part]] = []
        elif isinstance(error, EngineOutOfMemory):  # a smaller batch may fit
            self.models.unload_others(name, "out of memory")
            smaller = _halves(left, len(parts))
        else:  # one by one finds the member at fault
            smaller = [[part] for part in left] if len(parts) > 1 else []
        if not smaller:
            for part in left:
                self._finish(part, error, batch_size, started)
        for fewer in smaller:
            self._attempt(name, fewer, len(fewer))


class ContinuousRunner(EngineRunner):
    """Hands requests, each row a batch of its own, to an engine that batches by itself."""

    def __init__(
        self,
        models: ModelManager,
        report: Report,
        listens: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(models, report, listens, clock)
        self._running: set[Part] = set()

    def _accept(self, batch: Batch[Part]) -> None:
        started = time.perf_counter()
        part = batch.items[0]
        self._running.add(part)
        size = len(self._running)
        self.progress.begin([part.item])

        def done(outcome: Result) -> None:
            self._running.discard(part)
            if part.whole or not any(other.item is part.item for other in set(self._running)):
                self.progress.end([part.item])
            self._finish(part, _discreet(outcome, part), size, started)
            self._report(BatchDone(batch, time.perf_counter() - started))

        try:
            model = self._ready([part])
            started = time.perf_counter()
            if not isinstance(model, ContinuousModel):
                raise BadRequest("the request cannot join what runs")
            if part.opens and (refusal := self._refused(part, model)) is not None:
                raise refusal
            model.submit(part.request, done)
        except BaseException as raised:  # noqa: BLE001  # likewise
            done(self._wrapped(raised, [part]))


def _halves(parts: Sequence[Part], ran: int) -> list[list[Part]]:
    """These in two batches, of ``ran`` that ran together; one that ran by itself in halves, if it has several rows."""
    if ran > 1:
        middle = max(1, len(parts) // 2)
        return [list(parts[first : first + middle]) for first in range(0, len(parts), middle)]
    return [[half] for part in parts if len(part) > 1 for half in part.halves()]


def _discreet(outcome: Result, part: Part) -> Result:
    return discreet(outcome, [part.request]) if isinstance(outcome, FleetError) else outcome


def _model_of(part: Part) -> str:
    return part.rows.request.model


def _requests(parts: Sequence[Part]) -> list[InferenceRequest]:
    return [part.request for part in parts]
