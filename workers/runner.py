"""One engine on a thread of its own: takes batches, reports each member's outcome as soon as it is known."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from shared.contract import InferenceRequest
from shared.errors import EngineError, EngineLoadError, EngineOutOfMemory, FleetError
from workers.batcher import Batch
from workers.engines.base import EngineOutput
from workers.inflight import InFlight
from workers.models import ModelManager

logger = logging.getLogger(__name__)

Result = EngineOutput | FleetError


@dataclass(frozen=True, slots=True)
class Finished:
    """A member's outcome."""

    item: InFlight
    outcome: Result
    batch_size: int
    ran_ms: float


@dataclass(frozen=True, slots=True)
class BatchDone:
    """All members of a batch are through; the engine is free. ``seconds`` is how long it ran."""

    batch: Batch[InFlight]
    seconds: float


Report = Callable[[Finished | BatchDone], None]


class EngineRunner:
    """Runs batches one after the other. ``report`` is called on the engine's thread and must not block."""

    def __init__(self, models: ModelManager, report: Report) -> None:
        self.models = models
        self._report = report
        self._inbox: queue.SimpleQueue[Batch[InFlight] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"engine-{models.engine.name}", daemon=True)
        self._preload: Sequence[str] = ()
        self.loaded = threading.Event()

    def start(self, preload: Sequence[str]) -> None:
        """Start the thread; ``preload`` is loaded first and :attr:`loaded` is set after it."""
        self._preload = preload
        self._thread.start()

    def submit(self, batch: Batch[InFlight]) -> None:
        """Queue a batch."""
        self._inbox.put(batch)

    def stop(self, timeout: float) -> bool:
        """Let the current batch finish, unload, and end the thread; ``False`` if it is still running after that."""
        self._inbox.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        for name in self._preload:
            with suppress(FleetError):  # it is logged and announced; requests for it go to other engines
                self.models.get(name)
        self.loaded.set()
        while (batch := self._inbox.get()) is not None:
            started = time.perf_counter()
            self._run_batch(batch)
            self._report(BatchDone(batch, time.perf_counter() - started))
        self.models.close()

    def _run_batch(self, batch: Batch[InFlight]) -> None:
        name = batch.items[0].request.model if batch.items[0].request else ""
        self._attempt(name, batch.items, len(batch.items))

    def _attempt(self, name: str, items: Sequence[InFlight], batch_size: int) -> None:
        """Run ``items`` together. When the engine fails on all, run parts by themselves: the bad member fails alone."""
        started = time.perf_counter()
        open_members = dict(enumerate(items))

        def emit(index: int, outcome: Result) -> None:
            item = open_members.pop(index, None)
            if item is None:
                raise EngineError(f"member {index} of {len(items)} was answered twice, or is not there")
            self._report(Finished(item, outcome, batch_size, (time.perf_counter() - started) * 1000))

        error: FleetError
        try:
            model = self.models.get(name)
            model.infer(_requests(items), emit)
            if not open_members:
                return
            error = EngineError(f"the {self.models.engine.name} engine left {len(open_members)} members unanswered")
        except FleetError as raised:
            error = raised
        except Exception as raised:
            logger.exception("the %s engine failed on a batch of %d", self.models.engine.name, len(items))
            error = EngineError(f"{self.models.engine.name}: {type(raised).__name__}: {raised}")
        left = list(open_members.values())
        if (len(left) == 1 and len(items) == 1) or isinstance(error, EngineLoadError) or not error.hops:
            for item in left:
                self._report(Finished(item, error, batch_size, (time.perf_counter() - started) * 1000))
            return
        # Out of memory: a smaller batch may fit, so halves. Anything else: one by one finds the member at fault.
        size = max(1, len(left) // 2) if isinstance(error, EngineOutOfMemory) else 1
        for first in range(0, len(left), size):
            part = left[first : first + size]
            self._attempt(name, part, len(part))


def _requests(items: Sequence[InFlight]) -> list[InferenceRequest]:
    return [item.request for item in items if item.request is not None]
