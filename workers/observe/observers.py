"""Who is told of each step of requests, batches, models, leases and GPUs. None of them is in a request's way."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from shared.contract import EngineName
from workers.models.manager import ModelEvent
from workers.requests.ending import Ending
from workers.requests.inflight import InFlight

logger = logging.getLogger(__name__)


class Observer:
    """Is told of what happens, on the worker's loop, after it has happened. Override what is of interest.

    A step is told once. An observer returns soon, and does what takes long elsewhere; one that raises is counted, and
    harms nobody.
    """

    def request_received(self, item: InFlight) -> None:
        """A request was claimed, and its message is one."""

    def batch_started(self, engine: EngineName, items: Sequence[InFlight]) -> None:
        """Requests were handed to the engine together."""

    def batch_ended(self, engine: EngineName, size: int, seconds: float) -> None:
        """The engine is through with a batch."""

    def tokens_made(self, engine: EngineName, made: Sequence[tuple[InFlight, int]]) -> None:
        """A step of the engine has made so many more tokens of each of these requests."""

    def request_ended(self, ending: Ending) -> None:
        """A request has ended, and what that writes stands."""

    def request_left(self, item: InFlight) -> None:
        """A request left this worker without an end here: another worker has it, or its answer was there before."""

    def lease_lost(self, item: InFlight) -> None:
        """Another worker has taken a request over that was in this one's hands; it leaves as well."""

    def model_changed(self, engine: EngineName, event: ModelEvent) -> None:
        """A model was loaded or unloaded, rests or is back."""

    def gpus_changed(self, gpus: Sequence[str], problems: dict[str, str]) -> None:
        """These GPUs are leased now; ``problems`` says of those that failed why."""

    def flush(self) -> None:
        """The worker is about to end: let out what waits."""


STEPS = tuple(name for name, value in vars(Observer).items() if callable(value) and not name.startswith("_"))


class Observers:
    """All observers of a worker. ``failures`` counts, by observer and step, how often one has failed."""

    def __init__(self, observers: Iterable[Observer] = ()) -> None:
        self.failures: Counter[str] = Counter()
        self._listeners: dict[str, tuple[Callable[..., None], ...]] = dict.fromkeys(STEPS, ())
        self._posted: deque[tuple[str, tuple[Any, ...]]] = deque()
        for observer in observers:
            self.add(observer)

    def add(self, observer: Observer) -> None:
        """Tell this observer as well, from now on."""
        for step in STEPS:
            if getattr(type(observer), step) is not getattr(Observer, step):
                self._listeners[step] += (getattr(observer, step),)

    def listens(self, step: str) -> bool:
        """Whether anybody wants to be told of this step."""
        return bool(self._listeners[step])

    def tell(self, step: str, *args: Any) -> None:
        """Tell everybody who wants to know, in the order in which they were added. On the loop."""
        for listener in self._listeners[step]:
            try:
                listener(*args)
            except Exception as error:  # noqa: BLE001  # the boundary: what watches does not stop what is watched
                self._failed(listener, step, error)

    def post(self, step: str, *args: Any) -> None:
        """Have it told when the loop looks next. From any thread."""
        if self._listeners[step]:
            self._posted.append((step, args))

    def deliver(self) -> None:
        """Tell what was posted. On the loop."""
        while self._posted:
            step, args = self._posted.popleft()
            self.tell(step, *args)

    def _failed(self, listener: Callable[..., None], step: str, error: Exception) -> None:
        name = f"{type(getattr(listener, '__self__', listener)).__name__}.{step}"
        self.failures[name] += 1
        if self.failures[name] == 1:
            logger.error("%s failed (%s); requests go on, and further failures are counted", name, type(error).__name__,
                         exc_info=error)  # fmt: skip
