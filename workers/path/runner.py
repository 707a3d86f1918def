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

from shared.contract import InferenceRequest
from shared.errors import BadRequest, EngineError, EngineOutOfMemory, FleetError
from workers.engines.base import ContinuousModel, EngineOutput, LoadedModel
from workers.engines.common.quotes import discreet, told, traceback_of
from workers.models.manager import ModelManager
from workers.path.batcher import Batch
from workers.path.progress import Made, Progress
from workers.requests.inflight import InFlight

logger = logging.getLogger(__name__)

Result = EngineOutput | FleetError


@dataclass(frozen=True, slots=True)
class Finished:
    """A member's outcome. ``batch_size`` is how many ran side by side, ``ran_ms`` for how long, without loading."""

    item: InFlight
    outcome: Result
    batch_size: int
    ran_ms: float


@dataclass(frozen=True, slots=True)
class BatchDone:
    """All members of a batch are through. ``seconds`` is how long it ran: loading its model is no part of that."""

    batch: Batch[InFlight]
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

    Tokens are reported where somebody ``listens`` to them.
    """

    def __init__(self, models: ModelManager, report: Report, listens: Callable[[], bool] = lambda: False) -> None:
        self.models = models
        self.progress = Progress(lambda made: report(TokensMade(made)), listens)
        self._report = report
        self._inbox: queue.SimpleQueue[Batch[InFlight] | _Signal] = queue.SimpleQueue()
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

    def submit(self, batch: Batch[InFlight]) -> None:
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
    def _accept(self, batch: Batch[InFlight]) -> None:
        """Run a batch, or let it run."""

    def _ready(self, name: str) -> LoadedModel:
        """The model, loaded where it was not; :attr:`_loading` grows by the seconds that it took to be ready."""
        started = time.perf_counter()
        try:
            return self.models.get(name)
        finally:
            self._loading += time.perf_counter() - started

    def _finish(self, item: InFlight, outcome: Result, batch_size: int, started: float) -> None:
        self.progress.step()
        name = _model_of(item)
        if isinstance(outcome, EngineOutput):
            self.models.succeeded(name)
        elif outcome.hops:
            self.models.failed(name, outcome)
        self._report(Finished(item, outcome, batch_size, (time.perf_counter() - started) * 1000))

    def _changed(self) -> None:
        """A model has begun to rest: the fleet should know, and the thread has a time to wake up at."""
        self._report(ModelsChanged())
        self._inbox.put(_Signal.LOOK)

    def _wrapped(self, error: BaseException, items: Sequence[InFlight]) -> FleetError:
        """An engine's exception as an error of ours, which does not quote what the engine was given."""
        requests, engine = _requests(items), self.models.engine.name
        try:
            if isinstance(error, FleetError):
                return discreet(error, requests)
            logger.error("the %s engine failed\n%s", engine, traceback_of(error, requests))
            return EngineError(f"{engine}: {told(error, requests)}")
        except Exception:  # noqa: BLE001  # an exception whose text cannot be had
            return EngineError(f"{engine}: {type(error).__name__}")


class BatchRunner(EngineRunner):
    """Runs batches one after the other."""

    def _accept(self, batch: Batch[InFlight]) -> None:
        started, self._loading = time.perf_counter(), 0.0
        self.progress.begin(batch.items)
        self._attempt(_model_of(batch.items[0]), batch.items, len(batch.items))
        self.progress.end(batch.items)
        self._report(BatchDone(batch, time.perf_counter() - started - self._loading))

    def _attempt(self, name: str, items: Sequence[InFlight], batch_size: int) -> None:
        """Run ``items`` together. When the engine fails on all, run parts by themselves: the bad member fails alone."""
        started = time.perf_counter()
        open_members = dict(enumerate(items))

        def emit(index: int, outcome: Result) -> None:
            item = open_members.get(index)
            if item is None:
                raise EngineError(f"member {index} of {len(items)} was answered twice, or is not there")
            self._finish(item, _discreet(outcome, item), batch_size, started)
            del open_members[index]

        error: FleetError
        try:
            model = self._ready(name)
            started = time.perf_counter()
            model.infer(_requests(items), emit)
            if not open_members:
                return
            error = EngineError(f"the {self.models.engine.name} engine left {len(open_members)} members unanswered")
        except BaseException as raised:  # noqa: BLE001  # the boundary: whatever an engine raises is an outcome
            error = self._wrapped(raised, items)
        left = list(open_members.values())
        if (len(left) == 1 and len(items) == 1) or error.outage or not error.hops:
            for item in left:
                self._finish(item, error, batch_size, started)
            return
        size = 1  # one by one finds the member at fault
        if isinstance(error, EngineOutOfMemory):
            self.models.unload_others(name, "out of memory")
            size = max(1, len(left) // 2)  # a smaller batch may fit
        for first in range(0, len(left), size):
            part = left[first : first + size]
            self._attempt(name, part, len(part))


class ContinuousRunner(EngineRunner):
    """Hands requests, each a batch of its own, to an engine that batches by itself."""

    def __init__(self, models: ModelManager, report: Report, listens: Callable[[], bool] = lambda: False) -> None:
        super().__init__(models, report, listens)
        self._running: set[InFlight] = set()

    def _accept(self, batch: Batch[InFlight]) -> None:
        started = time.perf_counter()
        item, request = batch.items[0], batch.items[0].request
        self._running.add(item)
        size = len(self._running)
        self.progress.begin(batch.items)

        def done(outcome: Result) -> None:
            self._running.discard(item)
            self.progress.end(batch.items)
            self._finish(item, _discreet(outcome, item), size, started)
            self._report(BatchDone(batch, time.perf_counter() - started))

        try:
            model = self.models.get(_model_of(item))
            started = time.perf_counter()
            if not isinstance(model, ContinuousModel) or request is None:
                raise BadRequest("the request cannot join what runs")
            model.submit(request, done)
        except BaseException as raised:  # noqa: BLE001  # likewise
            done(self._wrapped(raised, [item]))


def _discreet(outcome: Result, item: InFlight) -> Result:
    return discreet(outcome, _requests([item])) if isinstance(outcome, FleetError) else outcome


def _model_of(item: InFlight) -> str:
    return item.request.model if item.request is not None else ""


def _requests(items: Sequence[InFlight]) -> list[InferenceRequest]:
    return [item.request for item in items if item.request is not None]
