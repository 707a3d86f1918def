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
from producer.client.submitted import Submitted
from shared import keys
from shared.errors import ClientClosed, FleetError

logger = logging.getLogger(__name__)

ELSEWHERE_SECONDS = 0.2
"""How often the results are looked up that go to another client's stream."""

LOOKED_UP = 1024
"""How many at once. All others are looked up in turn, each ``POLL_SECONDS``: their entries may be lost."""

F = TypeVar("F", bound=AnyFuture)


class _Ref(weakref.ref[Any]):
    """What is held by whoever waits for an outcome, and whose outcome it is."""

    __slots__ = ("id",)
    id: str


class Awaited(Generic[F]):
    """What this client has submitted, and the futures of those who wait for it. Safe to use from several threads.

    Both are held by whoever wants the outcome: when nobody does any longer, a request leaves the table. Futures whose
    owners are to be called back, and need not keep them, are held here. ``make`` makes a future.
    """

    def __init__(self, make: Callable[[], F], clock: Callable[[], float] = time.monotonic) -> None:
        self._make = make
        self._clock = clock
        self._refs: dict[str, tuple[_Ref, ...]] = {}
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
        made = [(request_id, self._make()) for request_id in request_ids]
        self._add(made)
        return [future for _, future in made]

    def add(self, submitted: Sequence[Submitted]) -> None:
        """Tell these their outcomes, too."""
        for one in submitted:
            one.table = self
        self._add([(one.id, one) for one in submitted])

    def _add(self, entries: Sequence[tuple[str, F | Submitted]]) -> None:
        refs, note = self._refs, self._note
        with self._lock:
            self._sweep()
            for request_id, entry in entries:
                ref = _Ref(entry, note)
                ref.id = request_id
                others = refs.get(request_id)
                refs[request_id] = (ref,) if others is None else (*others, ref)
        if self._ended:
            self.end()

    def forget(self, request_ids: Sequence[str], entries: Sequence[F | Submitted]) -> None:
        """These will not be resolved: their requests were not sent. Others may wait for the same requests."""
        with self._lock:
            for request_id, entry in zip(request_ids, entries, strict=True):
                self._keep(request_id, lambda known, entry=entry: known is not entry)  # type: ignore[misc]

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
        futures = []
        with self._lock:  # whoever makes a future of a request finds its outcome, or is found here
            for ref in self._refs.pop(request_id, ()):
                entry = ref()
                if type(entry) is Submitted:
                    entry.known = outcome
                elif entry is not None:
                    futures.append(entry)
            if self._elsewhere:
                self._elsewhere.pop(request_id, None)
        for future in futures:
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
            if (future := ref()) is not None and type(future) is not Submitted:
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

    def _keep(self, request_id: str, wanted: Callable[[object], bool]) -> None:
        """Of what waits for a request, keep what lives and is wanted; the lock is held."""
        found = ((ref, ref()) for ref in self._refs.get(request_id, ()))
        kept = tuple(ref for ref, entry in found if entry is not None and wanted(entry))
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
