"""What may become of a request, and when: all ends that are true of it, by what was asked and what was broken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from shared.errors import FleetError
from tests.faults.anything.book import Book, Entry, is_error
from tests.faults.anything.composition import Composition
from tests.faults.anything.draw import DEATH, LOSES_LEASES
from tests.faults.ledger import Ended, text_of
from workers.engines import fake

SENDERS = {"!BadRequest", "!PayloadTooLarge", "!UnknownModel", "!UnsupportedKind", "!UndecodableMessage"}
REVOKED = {"!Cancelled", "!TaskRevokedError"}
LATE = "!DeadlineExceeded"
SLACK = 2.0
"""Seconds that everything may take longer, where the machine is not known to be late."""

OF_WORDS = {
    "!fail": {"!EngineError"}, "!bad": {"!BadRequest"}, "!crash": {"!EngineError"}, "!quote": {"!EngineError"},
    "!busy": {"!EngineBusy", "!EngineError"}, "!die": {"!DeadLettered"},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Truth:
    """What is true of one run. Times are in seconds since the epoch."""

    made: Composition
    book: Book
    records: Mapping[str, list[Ended]]
    runs: Counter[str] = field(default_factory=Counter)
    lost: tuple[tuple[float, float], ...] = ()
    healed: float = 0.0
    lag: float = 0.0

    # -- of the whole -----------------------------------------------------------------------------------------------

    @property
    def patience(self) -> float:
        """Seconds within which what is normal happens."""
        return SLACK + 3 * self.lag

    @property
    def work(self) -> float:
        """Seconds that all requests take at most, one batch after the other."""
        made = self.made
        each = max((w.latency_ms / min(w.batch, 4) + w.per_item_ms for w in made.workers), default=0.0) / 1000
        rare = sum(w.first_ms + w.load_ms for w in made.workers) / 1000
        return rare + sum(0.4 if ask.word else each for ask in made.asks())

    @property
    def recovery(self) -> float:
        """Seconds after which what a fault has held up is on its way again."""
        if not self.made.faults and not self.deaths:
            return 0.0
        return self.made.lease + 6.0 + self.deaths * (self.made.lease + 3.0) * self.made.max_deliveries

    @property
    def deaths(self) -> int:
        """Requests that kill whoever runs them."""
        return sum(ask.word == DEATH for ask in self.made.asks())

    # -- of a request -----------------------------------------------------------------------------------------------

    def ended(self, entry: Entry) -> Ended | None:
        """Its first terminal record."""
        records = self.records.get(self.book.record_id(entry))
        return records[0] if records else None

    def may_be_lost(self, entry: Entry) -> bool:
        """Whether the broker may have lost it: it was sent in the time of which nothing is left."""
        ended = self.ended(entry)
        return any(
            entry.began <= until
            and (entry.accepted is None or entry.accepted >= since)
            and (ended is None or ended.at >= until or since > 0.0)
            for since, until in self.lost
        )

    def may_be_forgotten(self, entry: Entry, at: float) -> bool:
        """Whether the broker may have lost what was written of it at this time: its end, or a cancellation."""
        return self.may_be_lost(entry) or any(since <= at <= until for since, until in self.lost)

    def in_time(self, entry: Entry) -> float:
        """When it must have ended."""
        ready = max(entry.began, entry.accepted or 0.0, self.healed) + (entry.caller.countdown or 0.0)
        usual = ready + self.work + self.recovery + 2 * self.patience
        if entry.deadline is None or self.made.faults:
            return usual
        return min(usual, entry.deadline + 1.0 + self.patience)

    def untrue(self, entry: Entry, ended: Ended) -> str | None:
        """Why this end cannot be, or ``None`` where it can."""
        end, ask, caller = ended.answer, entry.ask, entry.caller
        if end == LATE:
            return self._not_late(entry, ended)
        if end in REVOKED:
            wanted = entry.cancelled is not None or self._member_revoked(entry)
            expired = caller.expires is not None and ended.at >= entry.began + caller.expires - 0.05
            return None if wanted or expired else "nobody revoked it"
        if ask.odd:
            return None if end in SENDERS else "its sender's error was not found"
        if entry.cancel_said and not self.may_be_forgotten(entry, entry.cancelled or 0.0):
            return "its cancellation was confirmed"
        if end == "!DeadLettered":
            return self._not_given_up(entry)
        if entry.members:
            return self._of_body(entry, end)
        if entry.after is not None and (before := self._failed_before(entry)) is not None:
            if is_error(end):
                return None
            if before not in REVOKED or not self._overtaken([entry.after]):
                return f"the step before it ended with {before}"
        return self._of_itself(entry, end)

    def _of_itself(self, entry: Entry, end: str) -> str | None:
        ask = entry.ask
        if entry.after is not None or entry.members:  # its own words are not what it works on
            return None if end == self.answer(entry) else f"it ought to be {self.answer(entry)[:60]!r}"
        allowed = set(OF_WORDS.get(ask.word, ()))
        pytorch = any("pytorch" in worker.queues for worker in self.made.workers) and ask.model == "echo"
        if ask.word == "!hop" and (not pytorch or self.made.faults or any(w.at for w in self.made.workers)):
            allowed.add("!EngineError")
        if ask.word not in OF_WORDS and not (ask.word == "!hop" and not pytorch):
            allowed.add(self.answer(entry))
        if end in allowed:
            return None
        wanted = " or ".join(sorted(one[:60] for one in allowed))
        return f"it ought to be {wanted!r}"

    def answer(self, entry: Entry) -> str:
        """The right answer."""
        if entry.after is not None or entry.members:
            return entry.expected or ""
        found = fake.answer(entry.ask.parsed())
        return f"!{type(found).__name__}" if isinstance(found, FleetError) else text_of(found.outputs)

    def _not_late(self, entry: Entry, ended: Ended) -> str | None:
        if entry.deadline is None:
            return "it has no deadline"
        worker = max((w.latency_ms + w.per_item_ms * w.batch for w in self.made.workers), default=0.0) / 1000
        early = entry.deadline - ended.at - 2 * worker - 0.1
        return f"its deadline was {early:.2f} s away" if early > 0 else None

    def _not_given_up(self, entry: Entry) -> str | None:
        if entry.ask.word == DEATH:
            return None
        losses = sum(fault.kind in LOSES_LEASES for fault in self.made.faults)
        if self.deaths and losses:
            return None
        return (
            f"{losses} faults may have cost it a delivery, and {self.made.max_deliveries} are allowed"
            if losses < self.made.max_deliveries
            else None
        )

    def _failed_before(self, entry: Entry) -> str | None:
        """The end of the step before it, where that is not an answer."""
        before = self.ended(self.book.entries[entry.after or ""])
        return before.answer if before is not None and is_error(before.answer) else None

    def _member_revoked(self, entry: Entry) -> bool:
        before = self.book.entries.get(entry.after or "")
        if before is None:
            return False
        ended = self.ended(before)
        return ended is not None and ended.answer in REVOKED

    def _of_body(self, entry: Entry, end: str) -> str | None:
        ends = [self.ended(self.book.entries[member]) for member in entry.members]
        failed = [one.answer for one in ends if one is not None and is_error(one.answer)]
        if failed and end == "!ChordError":
            return None
        if failed and not (REVOKED.issuperset(failed) and self._overtaken(entry.members)):
            return f"a member ended with {failed[0]}"
        return self._of_itself(entry, end)

    def _overtaken(self, request_ids: Iterable[str]) -> bool:
        """Whether what was revoked had run: its canvas goes on before its record is written, and another came first."""
        entries = [self.book.entries[one] for one in request_ids]
        return all(
            self.runs[self.book.record_id(one)]
            for one in entries
            if (ended := self.ended(one)) and ended.answer in REVOKED
        )
