"""Who waits for the outcome of which request: one table a client, the same for threads and for asyncio."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from asyncio import InvalidStateError as AsyncioInvalidStateError
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import InvalidStateError
from contextlib import suppress
from itertools import islice
from typing import Any, Generic, TypeVar

from producer.client.records import POLL_SECONDS, Outcome, decode_record, outcome_of
from producer.client.steps import AnyFuture, Command, Steps
from shared import keys
from shared.errors import ClientClosed, FleetError

logger = logging.getLogger(__name__)

ELSEWHERE_SECONDS = 0.2
"""How often the results are looked up that go to another client's stream."""

LOOKED_UP = 1024
"""How many at once. All others are looked up in turn, each ``POLL_SECONDS``: their entries may be lost."""

F = TypeVar("F", bound=AnyFuture)


class _Ref(weakref.ref[F]):
    """A future that is held by whoever waits for it, and whose request it is."""

    __slots__ = ("id",)
    id: str


class Awaited(Generic[F]):
    """The futures of this client's requests, one for each who waits. Safe to use from several threads.

    A future is held by whoever waits for it: when nobody does any longer, its request leaves the table. Those whose
    owners are to be called back, and need not keep them, are held here. ``make`` makes one.
    """

    def __init__(self, make: Callable[[], F], clock: Callable[[], float] = time.monotonic) -> None:
        self._make = make
        self._clock = clock
        self._refs: dict[str, tuple[_Ref[F], ...]] = {}
        self._elsewhere: dict[str, None] = {}
        self._held: set[F] = set()
        self._everything_at = self._elsewhere_at = 0.0
        self._ended = False
        self._lock = threading.Lock()
        gone = self._gone = deque[str]()  # the lock may be held by the thread in which the collector finds them
        self._note = lambda ref: gone.append(ref.id)

    def __len__(self) -> int:
        """How many requests are waited for."""
        if self._gone:
            with self._lock:
                self._sweep()
        return len(self._refs)

    def expect(self, request_ids: Iterable[str]) -> list[F]:
        """A new future for each request."""
        made = []
        with self._lock:
            self._sweep()
            for request_id in request_ids:
                future = self._make()
                ref = _Ref(future, self._note)
                ref.id = request_id
                self._refs[request_id] = (*self._refs.get(request_id, ()), ref)
                made.append(future)
        if self._ended:
            self.end()
        return made

    def forget(self, request_ids: Sequence[str], futures: Sequence[F]) -> None:
        """These futures will not be resolved: their requests were not sent. Others may wait for the same requests."""
        with self._lock:
            for request_id, future in zip(request_ids, futures, strict=True):
                self._keep(request_id, lambda known, future=future: known is not future)  # type: ignore[misc]

    def has(self, future: F) -> bool:
        """Whether a future is to be resolved here: not one of another process, or of another event loop."""
        return getattr(future, "table", None) is self

    # -- to be called back ------------------------------------------------------------------------------------------

    @property
    def holds(self) -> bool:
        """Whether somebody is to be called back."""
        return bool(self._held)

    def hold(self, future: F) -> None:
        """Keep a future that is not done: its owner need not."""
        self._held.add(future)

    def release(self, future: F) -> None:
        """Keep it no longer."""
        self._held.discard(future)

    # -- outcomes ---------------------------------------------------------------------------------------------------

    def resolve(self, request_id: str, outcome: Outcome) -> None:
        """Give those who wait for a request its outcome."""
        with self._lock:
            refs = self._refs.pop(request_id, ())
            self._elsewhere.pop(request_id, None)
        for ref in refs:
            if (future := ref()) is not None:
                settle(future, outcome)

    def resolve_record(self, record: bytes | str) -> None:
        """The same with what a record tells, where that is a terminal one."""
        try:
            decoded = decode_record(record)
        except FleetError:
            logger.error("a record on the reply stream cannot be read; its request is looked up where it is stored")
            return
        if (outcome := outcome_of(decoded)) is not None:
            self.resolve(decoded["task_id"], outcome)

    def resolve_stored(self, request_id: str, record: bytes | str) -> None:
        """The same with what is stored under a request's id: an error where that is no record."""
        try:
            outcome = outcome_of(decode_record(record))
        except FleetError as error:
            outcome = error
        if outcome is not None:
            self.resolve(request_id, outcome)

    def end(self) -> None:
        """The client is closed: whoever waits is told so, now and from now on."""
        self._ended = True
        with self._lock:
            refs = [ref for known in self._refs.values() for ref in known]
            self._refs.clear()
            self._elsewhere.clear()
        for ref in refs:
            if (future := ref()) is not None:
                with suppress(InvalidStateError, AsyncioInvalidStateError):
                    future.set_exception(ClientClosed())
                    future.exception()  # so that nobody complains where nobody waits any longer

    # -- looking up -------------------------------------------------------------------------------------------------

    @property
    def elsewhere(self) -> bool:
        """Whether results are waited for that go to another client's stream."""
        return bool(self._elsewhere)

    def watch(self, request_ids: Iterable[str]) -> None:
        """Look these up often: another client has submitted them, and their results go to its stream."""
        with self._lock:
            self._elsewhere.update((request_id, None) for request_id in request_ids if request_id in self._refs)

    def due(self) -> list[str]:
        """The requests whose results are to be looked up now."""
        now = self._clock()
        with self._lock:
            self._sweep()
            if now >= self._everything_at:
                self._everything_at = now + POLL_SECONDS
                return _in_turn(self._refs)
            if self._elsewhere and now >= self._elsewhere_at:
                self._elsewhere_at = now + ELSEWHERE_SECONDS
                return _in_turn(self._elsewhere)
        return []

    def _sweep(self) -> None:
        """Let go of the requests that nobody waits for any longer; the lock is held."""
        while self._gone:
            self._keep(self._gone.popleft(), lambda _: True)

    def _keep(self, request_id: str, wanted: Callable[[F], bool]) -> None:
        """Of the futures of a request, keep those that live and are wanted; the lock is held."""
        found = ((ref, ref()) for ref in self._refs.get(request_id, ()))
        kept = tuple(ref for ref, future in found if future is not None and wanted(future))
        if kept:
            self._refs[request_id] = kept
        else:
            self._refs.pop(request_id, None)
            self._elsewhere.pop(request_id, None)


def settle(future: AnyFuture, outcome: Outcome) -> None:
    """Give a future its outcome; nothing comes of it where its owner has cancelled it."""
    with suppress(InvalidStateError, AsyncioInvalidStateError):
        future.set_result(outcome)


def look_up(table: Awaited[Any], request_ids: Sequence[str]) -> Steps[None]:
    """Resolve those whose results are stored."""
    for start in range(0, len(request_ids), LOOKED_UP):
        piece = request_ids[start : start + LOOKED_UP]
        records = yield Command(("MGET", *map(keys.result_key, piece)))
        for request_id, record in zip(piece, records, strict=True):
            if record is not None:
                table.resolve_stored(request_id, record)


def _in_turn(known: dict[str, Any]) -> list[str]:
    """The first of them, which become the last."""
    first = list(islice(known, LOOKED_UP))
    if len(first) < len(known):
        for request_id in first:
            known[request_id] = known.pop(request_id)
    return first
