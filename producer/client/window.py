"""Submitting many requests with a bounded number of them under way, and their outcomes in order."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from producer.client.records import POLL_SECONDS, Outcome
from producer.client.steps import AnyFuture, Pause, Steps, Wait
from producer.client.submission import RequestLike, Submission
from producer.client.submitted import Submitted
from shared.contract import InferenceResult
from shared.errors import BrokerUnavailable, ClientClosed, FleetError, Overloaded

CHUNK = 64
"""Requests that are submitted at once."""

LOOKING_SECONDS = 0.02
"""How often it is looked for the next outcome while there is more to submit: each look is a question to the broker."""

READING_SECONDS = 0.01
"""How long a source is read for one chunk: what a slow one has yielded does not wait for the rest."""

OUTCOMES = (FleetError, InferenceResult)

Item = RequestLike | Outcome
"""A request, or the outcome of one that needs no submitting."""


class Source(Protocol):
    """Where the items come from."""

    @property
    def ended(self) -> bool:
        """Whether all has been taken."""

    def take(self, most: int) -> list[Item]:
        """The next items, at most so many; none where it has ended, or where none is there yet."""

    @property
    def arrival(self) -> AnyFuture | None:
        """What is done when there is more to take, where :meth:`take` does not wait for it."""


class Submitting(Protocol):
    """What a window asks of :class:`~producer.client.requests.Requests`."""

    def checked(self, request: RequestLike) -> Submission:
        """The request; raises :class:`~shared.errors.BadRequest` where it is none."""

    def submit(self, requests: Sequence[Submission], timeout: float | None) -> Steps[list[Submitted]]:
        """Submit several: all of them or, where one is refused, none."""

    def ready(self, submitted: Submitted, seconds: float, other: AnyFuture | None = None) -> Steps[Outcome | None]:
        """The outcome where it comes within so many seconds, and before ``other`` is done."""

    def look(self, submitted: Submitted, through_outages: bool) -> Steps[Outcome | None]:
        """Look for an outcome that does not come by itself."""

    def outcome(self, submitted: Submitted, timeout: float | None, *, through_outages: bool) -> Steps[Outcome]:
        """Wait for the outcome; raises :class:`TimeoutError`."""


class Reading:
    """A source that is read as items are wanted."""

    arrival = None

    def __init__(self, items: Iterable[Item], clock: Callable[[], float] = time.monotonic) -> None:
        self._items: Iterator[Item] = iter(items)
        self._clock = clock
        self.ended = False

    def take(self, most: int) -> list[Item]:
        """The next items. A slow source is asked for no more than one beyond the time for a chunk."""
        taken: list[Item] = []
        until = self._clock() + READING_SECONDS
        for item in self._items:
            taken.append(item)
            if len(taken) >= most or self._clock() > until:
                return taken
        self.ended = True
        return taken


class Window:
    """At most ``size`` requests under way. ``timeout`` is each one's, in seconds.

    With ``patient``, a broker that is away is waited for once a request has been submitted. Where it is left in the
    middle of :meth:`next`, nothing is lost: the next call goes on, and what may have been sent goes under the same id.
    """

    _requests: Submitting

    def __init__(self, source: Source, size: int, timeout: float | None, *, patient: bool) -> None:
        self._source = source
        self._size = size
        self._timeout = timeout
        self._patient = patient
        self._read: deque[Submission | Outcome] = deque()
        self._under_way: deque[Submitted | Outcome] = deque()
        self._chunk = min(CHUNK, size)
        self._at_once = self._chunk
        self._singly = 0
        self._not_before = 0.0
        self._looked = 0.0

    def known(self) -> Outcome | None:
        """The next outcome where it is known: then there is no need to call :meth:`next`."""
        if not self._under_way:
            return None
        first = self._under_way[0]
        outcome = first.known if isinstance(first, Submitted) else first
        if outcome is not None:
            self._under_way.popleft()
        return outcome

    def next(self, requests: Submitting) -> Steps[Outcome | None]:
        """The next outcome, in the order of the items; ``None`` after the last. Submits what there is room for."""
        self._requests = requests
        while (outcome := self.known()) is None:
            submitting = bool(self._read) or self._wants_more()
            if self._under_way and (outcome := (yield from self._first(busy=submitting))) is not None:
                self._under_way.popleft()
                return outcome
            if self._read:
                yield from self._submit()
            elif self._wants_more():
                yield from self._take()
            elif not self._under_way:
                return None
        return outcome

    def _wants_more(self) -> bool:
        return not self._source.ended and len(self._under_way) <= self._size - self._chunk

    def _first(self, *, busy: bool) -> Steps[Outcome | None]:
        """The outcome of the first: what there is, or, where nothing else can be done meanwhile, what comes."""
        first = self._under_way[0]
        if not isinstance(first, Submitted):
            return first
        if not busy:
            return (yield from self._requests.outcome(first, None, through_outages=self._patient))
        pause = self._not_before - time.monotonic() if self._read else 0.0
        if pause <= 0:
            if time.monotonic() < self._looked + LOOKING_SECONDS:
                return None
            outcome = yield from self._requests.ready(first, 0.0)
            self._looked = time.monotonic()
            return outcome
        try:
            return (yield from self._requests.outcome(first, pause, through_outages=self._patient))
        except TimeoutError:
            return None

    def _take(self) -> Steps[None]:
        """Read items; where none is there yet, wait for one, or for the outcome that is next."""
        for item in (taken := self._source.take(self._chunk)):
            self._read.append(self._checked(item))
        arrival = self._source.arrival
        if taken or self._source.ended or arrival is None:
            return
        if self._under_way and isinstance(first := self._under_way[0], Submitted):
            found = yield from self._requests.ready(first, POLL_SECONDS, arrival)
            if found is None and not arrival.done():
                found = yield from self._requests.look(first, self._patient)
            if found is not None:
                self._under_way[0] = found
        else:
            yield Wait(arrival, POLL_SECONDS)

    def _checked(self, item: Item) -> Submission | Outcome:
        if isinstance(item, OUTCOMES):
            return item
        try:
            return self._requests.checked(item)
        except FleetError as error:
            return error

    def _submit(self) -> Steps[None]:
        """Submit some of what was read; where the fleet is full, not before it says that there will be room."""
        if (pause := self._not_before - time.monotonic()) > 0:
            yield Pause(pause)  # nothing is under way
        piece: list[Outcome | None] = []  # nothing where a request is
        requests: list[Submission] = []
        most = 1 if self._singly else self._at_once
        for item in self._read:
            if isinstance(item, OUTCOMES):
                piece.append(item)
                continue
            if len(requests) == most:
                break
            requests.append(item)
            piece.append(None)
        found: Sequence[Submitted | FleetError] = ()
        try:
            if requests:
                found = yield from self._requests.submit(requests, self._timeout)
        except ClientClosed:
            raise
        except BrokerUnavailable as error:
            found = [error] * len(requests)
        except Overloaded as error:  # there will be room: a smaller piece finds it sooner
            self._not_before = time.monotonic() + error.retry_after
            self._at_once = (len(requests) + 1) // 2
            return
        except FleetError as error:
            if len(requests) > 1:  # one of them is bad: by themselves they say which
                self._singly = len(requests)
                return
            found = [error]
        self._singly = max(0, self._singly - len(requests))
        self._at_once = min(self._chunk, self._at_once + max(1, self._at_once // 4))
        outcomes = iter(found)
        for outcome in piece:
            self._read.popleft()
            self._under_way.append(next(outcomes) if outcome is None else outcome)
