"""What those who ask have seen: noted by them, read by the checks. Times are in seconds since the epoch."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from producer.client.records import Outcome
from shared.errors import FleetError
from tests.faults.anything.composition import OURS, Ask, Caller
from tests.faults.ledger import text_of


@dataclass(slots=True)
class Entry:
    """One request: who sent it when, what was promised, and what its sender was told."""

    ask: Ask
    caller: Caller
    began: float
    """When it was sent first."""
    accepted: float | None = None
    """When its sender knew that it was taken."""
    unsure: bool = False
    """It may have been taken: an error left that open, and it was not sent again."""
    refused: str | None = None
    cancelled: float | None = None
    cancel_said: bool | None = None
    waited_from: float = 0.0
    """When its sender began to wait."""
    awaited: bool = True
    """Whether somebody waits for it."""
    told: list[tuple[str, float]] = field(default_factory=list)
    expected: str | None = None
    """The answer it ought to get, where that does not follow from its own inputs."""
    after: str | None = None
    """The step of a chain before it."""
    members: tuple[str, ...] = ()
    """The members of the chord whose body it is."""
    conflicts: bool = False
    """Its id was used for another request before."""

    @property
    def deadline(self) -> float | None:
        """From when on it is too late for it, reckoned from the first try to send it."""
        return None if self.caller.timeout is None else self.began + self.caller.timeout


@dataclass(slots=True)
class Hindrance:
    """A submit that was refused for a while, and why."""

    id: str
    error: str
    at: float


class Book:
    """The notes of one run. From any thread."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.hindrances: list[Hindrance] = []
        self.odd: list[str] = []
        """What went wrong in a caller that ought not to, a line each."""
        self.given_ids: dict[str, str] = {}
        """The ids that a batch run has given to lines, by those of the composition."""
        self.order: list[list[str]] = []
        """Ids in the order in which one sender sent them."""
        self._lock = threading.Lock()

    def record_id(self, entry: Entry) -> str:
        """The id under which it runs: our client keeps those of tenants apart."""
        ask = entry.ask
        plain = ask.tenant == "default" or entry.caller.how not in OURS
        return self.given_ids.get(ask.id, ask.own_id if plain else f"{ask.tenant}/{ask.own_id}")

    def sending(self, ask: Ask, caller: Caller, **known: Any) -> Entry:
        """A request is about to be sent."""
        with self._lock:
            return self.entries.setdefault(ask.id, Entry(ask, caller, time.time(), **known))

    def accepted(self, asks: Sequence[Ask]) -> None:
        """They were taken."""
        now = time.time()
        with self._lock:
            for ask in asks:
                entry = self.entries[ask.id]
                entry.accepted = entry.accepted or now

    def hindered(self, asks: Sequence[Ask], error: BaseException) -> None:
        """They were not taken now, and will be tried again."""
        with self._lock:
            self.hindrances.append(Hindrance(asks[0].id, type(error).__name__, time.time()))

    def refused(self, ask: Ask, error: BaseException, *, unsure: bool = False) -> None:
        """It was not taken, and is not tried again."""
        with self._lock:
            entry = self.entries[ask.id]
            entry.refused, entry.unsure = type(error).__name__, unsure

    def told(self, request_id: str, outcome: Outcome | str) -> None:
        """Whoever waits was told of the end: the answer, or ``!`` and the name of the error."""
        end = outcome if isinstance(outcome, str) else end_of(outcome)
        with self._lock:
            self.entries[request_id].told.append((end, time.time()))

    def waiting(self, request_ids: Iterable[str]) -> None:
        """Their sender waits for them from now on."""
        now = time.time()
        with self._lock:
            for request_id in request_ids:
                self.entries[request_id].waited_from = now

    def cancelling(self, request_id: str) -> None:
        """It is about to be cancelled."""
        with self._lock:
            self.entries[request_id].cancelled = time.time()

    def cancelled(self, request_id: str, said: bool) -> None:
        """The fleet says whether it was in time."""
        with self._lock:
            self.entries[request_id].cancel_said = said

    def sent_in_order(self, asks: Sequence[Ask]) -> None:
        """One sender sent these, one after the other."""
        with self._lock:
            self.order.append([ask.id for ask in asks])

    def trouble(self, text: str) -> None:
        """Something happened to a caller that ought not to."""
        with self._lock:
            self.odd.append(text)


def is_error(end: str) -> bool:
    """Whether an end is an error's name: answers that begin with ``!`` have more words than one."""
    return end.startswith("!") and " " not in end


def end_of(outcome: Outcome) -> str:
    """An outcome as the ledger has it."""
    if isinstance(outcome, FleetError):
        return f"!{type(outcome).__name__}"
    return text_of(outcome.outputs)
