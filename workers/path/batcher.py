"""Micro-batching: which waiting requests run together, and when. Pure: no clock, no thread, no broker.

Requests with equal keys may share a batch. A batch is due when it is full (by rows or by tokens), when its oldest
member has waited for the timeout, or, with adaptive batching, as soon as waiting cannot pay. The last rule is for
closed loops: callers that were answered together are likely to come back together, so a partial batch waits for as many
as ran last time, but only while they keep coming: the patience between two arrivals is a small share of what a batch
takes. A lone request follows a batch of one, so it never waits.

A request has one row or many. One with more than a batch has room for runs in parts: the oldest of such has half of a
batch, and what is left when those that fit whole have been let in; what remains of it goes behind all that waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Generic, TypeVar

T = TypeVar("T")

PATIENCE_SHARE = 0.125
"""How much of a batch's usual duration may pass without an arrival before a partial batch runs."""

SMOOTHING = 0.3
"""Weight of the newest batch in the running mean of durations."""


class FlushReason(StrEnum):
    """Why a batch was formed."""

    SIZE = "size"
    TOKENS = "tokens"
    TIMEOUT = "timeout"
    IDLE = "idle"


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """When a batch is full and how long it may wait. Times in seconds; the sizes are in rows.

    ``alone``: a batch has rows of one request only, and is due at once.
    """

    max_batch_size: int = 32
    max_batch_tokens: int = 65536
    batch_timeout: float = 0.05
    adaptive: bool = True
    min_batch_size: int = 1
    alone: bool = False

    def unbatched(self) -> BatchLimits:
        """The same with batching switched off: every request by itself, at once."""
        return replace(self, batch_timeout=0.0, adaptive=True, min_batch_size=1, alone=True)


@dataclass(frozen=True, slots=True, eq=False)
class Batch(Generic[T]):
    """Requests that run together, in the order in which they came. Equal to itself only.

    ``rows`` are those of each that are in it.
    """

    key: Hashable
    items: list[T]
    tokens: int
    reason: FlushReason
    waited: float
    rows: Sequence[range] = ()


@dataclass(slots=True, eq=False)
class _Member(Generic[T]):
    """A request that waits: with all of its rows, or with those from ``first`` on, where others have run."""

    item: T
    sizes: Sequence[int]
    rows: int
    tokens: int
    arrived: float
    number: int
    begun: bool = False
    first: int = 0
    taken: int = 0
    """Rows that the batch which is being formed takes of it."""


@dataclass(slots=True)
class _Group(Generic[T]):
    members: deque[_Member[T]] = field(default_factory=deque)
    rows: int = 0
    tokens: int = 0
    begun: int = 0
    last_arrival: float = 0.0

    def count(self) -> None:
        """Sum up what is there."""
        self.rows = sum(member.rows for member in self.members)
        self.tokens = sum(member.tokens for member in self.members)
        self.begun = sum(member.begun for member in self.members)


@dataclass(slots=True)
class _Room:
    """What a batch still takes. It takes one row whatever its size."""

    rows: int
    tokens: int
    empty: bool = True

    def take(self, member: _Member[T], most: int, tokens: int) -> bool:
        """As many of its next rows as fit, within ``most`` rows and ``tokens``; whether any."""
        before = member.taken
        while member.taken < member.rows and self.rows and member.taken - before < most:
            size = member.sizes[member.first + member.taken]
            if size > tokens and not self.empty:
                break
            member.taken += 1
            tokens -= size
            self.rows -= 1
            self.tokens -= size
            self.empty = False
        return member.taken > before


@dataclass(slots=True)
class _History:
    size: int = 1
    duration: float = 0.0


class Batcher(Generic[T]):
    """Holds waiting requests by key and hands out batches that are due."""

    def __init__(self, limits: BatchLimits) -> None:
        self.limits = limits
        self._groups: dict[Hashable, _Group[T]] = {}
        self._history: dict[Hashable, _History] = {}
        self._size = 0
        self._begun = 0
        self._parted = False
        self._added = 0

    @property
    def begun(self) -> int:
        """How many of those that wait have had rows in a batch."""
        return self._begun

    def waits(self, key: Hashable) -> bool:
        """Whether requests of this key wait."""
        return key in self._groups

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[T]:
        return (member.item for group in self._groups.values() for member in group.members)

    def add(self, item: T, key: Hashable, tokens: int | Sequence[int], now: float, *, begun: bool = False) -> None:
        """Let a request of ``tokens`` tokens wait with the others of its key; for one with many rows those of each.

        One that has ``begun`` is due at once.
        """
        sizes = (tokens,) if isinstance(tokens, int) else tokens
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group()
        member = _Member(item, sizes, len(sizes), sum(sizes), now, self._added, begun)
        group.members.append(member)
        group.rows += member.rows
        group.tokens += member.tokens
        group.begun += begun
        group.last_arrival = now
        self._size += 1
        self._begun += begun
        self._added += 1

    def next_batch(self, now: float) -> Batch[T] | None:
        """The batch that is due and has waited longest, or ``None``. Ask when an engine is free to run it."""
        groups = sorted(self._groups.items(), key=lambda entry: entry[1].members[0].number)
        if self._parted:  # then what is new goes before other parts
            groups.sort(key=lambda entry: entry[1].begun == len(entry[1].members))
        for key, group in groups:
            reason = self._due(key, group, now)
            if reason is not None:
                return self._form(key, group, reason, now)
        return None

    def due_at(self, now: float) -> float | None:
        """When to ask :meth:`next_batch` again if nothing else happens; ``None`` when nothing waits."""
        return min((self._due_time(key, group, now) for key, group in self._groups.items()), default=None)

    def finished(self, key: Hashable, size: int, duration: float) -> None:
        """Learn from a batch that ran: how many rows it had and how many seconds it took."""
        history = self._history.setdefault(key, _History(size, duration))
        history.size = size
        history.duration += SMOOTHING * (duration - history.duration)

    def expected_duration(self, key: Hashable) -> float | None:
        """How many seconds a batch of this key usually takes; ``None`` where none has run."""
        history = self._history.get(key)
        return None if history is None else history.duration

    def remove(self, unwanted: Callable[[T], bool]) -> list[T]:
        """Take out the waiting requests for which ``unwanted`` is true."""
        removed: list[T] = []
        for key in list(self._groups):
            group = self._groups[key]
            kept = deque(member for member in group.members if not unwanted(member.item))
            if len(kept) == len(group.members):
                continue
            gone = [member for member in group.members if unwanted(member.item)]
            removed.extend(member.item for member in gone)
            self._begun -= sum(member.begun for member in gone)
            group.members = kept
            group.count()
            if not kept:
                del self._groups[key]
        self._size -= len(removed)
        return removed

    def drain(self) -> list[T]:
        """Take out everything that waits and has not begun, in the order of arrival."""
        members = sorted(
            (member for group in self._groups.values() for member in group.members if not member.begun),
            key=lambda member: member.number,
        )
        if len(members) == self._size:
            self._groups.clear()
            self._size = 0
            return [member.item for member in members]
        drained = set(members)
        for key in list(self._groups):
            group = self._groups[key]
            group.members = deque(member for member in group.members if member not in drained)
            group.count()
            if not group.members:
                del self._groups[key]
        self._size -= len(members)
        return [member.item for member in members]

    # -- rules ------------------------------------------------------------------------------------------------------

    def _due(self, key: Hashable, group: _Group[T], now: float) -> FlushReason | None:
        limits = self.limits
        if group.rows >= limits.max_batch_size or limits.alone:
            return FlushReason.SIZE
        if group.tokens >= limits.max_batch_tokens:
            return FlushReason.TOKENS
        if group.begun:
            return FlushReason.IDLE
        if now >= group.members[0].arrived + limits.batch_timeout:
            return FlushReason.TIMEOUT
        if limits.adaptive and now >= self._idle_time(key, group):
            return FlushReason.IDLE
        return None

    def _due_time(self, key: Hashable, group: _Group[T], now: float) -> float:
        limits = self.limits
        if group.rows >= limits.max_batch_size or group.tokens >= limits.max_batch_tokens:
            return now
        if group.begun or limits.alone:
            return now
        timeout = group.members[0].arrived + self.limits.batch_timeout
        return min(timeout, self._idle_time(key, group)) if self.limits.adaptive else timeout

    def _idle_time(self, key: Hashable, group: _Group[T]) -> float:
        """From when on waiting cannot pay."""
        if group.rows < self.limits.min_batch_size:
            return float("inf")
        history = self._history.get(key)
        expected = min(history.size, self.limits.max_batch_size) if history else 1
        if history is None or group.rows >= expected:
            return group.last_arrival
        return group.last_arrival + PATIENCE_SHARE * history.duration

    def _form(self, key: Hashable, group: _Group[T], reason: FlushReason, now: float) -> Batch[T]:
        limits, members = self.limits, group.members
        room = _Room(limits.max_batch_size, limits.max_batch_tokens)
        head, *others = [members[0]] if limits.alone else members
        waited = now - head.arrived
        if others:
            room.take(head, max(1, room.rows // 2), room.tokens // 2)
        parts = [head]
        for member in others:  # those that are new and fit whole
            if not room.rows:
                break
            if member.begun:
                parts.append(member)
            elif member.rows <= room.rows and member.tokens <= room.tokens:
                room.take(member, member.rows, room.tokens)
            elif member.rows > 1:
                parts.append(member)
            else:
                reason = FlushReason.TOKENS
                break
        for member in parts:
            room.take(member, room.rows, room.tokens)
        chosen = [member for member in members if member.taken]
        batch = Batch(
            key,
            [member.item for member in chosen],
            limits.max_batch_tokens - room.tokens,
            reason,
            waited,
            [range(member.first, member.first + member.taken) for member in chosen],
        )
        self._take_out(key, group, chosen, batch.tokens)
        return batch

    def _take_out(self, key: Hashable, group: _Group[T], chosen: Sequence[_Member[T]], tokens: int) -> None:
        """What was chosen, of so many tokens, goes; what remains of it waits behind the others."""
        partly = [member for member in chosen if member.taken < member.rows]
        before = sum(member.begun for member in chosen)
        begun = len(partly) - before
        self._parted = bool(partly or before)
        self._size -= len(chosen) - len(partly)
        self._begun += begun
        group.begun += begun
        group.rows -= sum(member.taken for member in chosen)
        group.tokens -= tokens
        group.members = deque(member for member in group.members if not member.taken)
        for member in partly:
            member.tokens -= sum(member.sizes[member.first : member.first + member.taken])
            member.first, member.rows, member.taken = member.first + member.taken, member.rows - member.taken, 0
            member.begun, member.number = True, self._added
            self._added += 1
            group.members.append(member)
        if not group.members:
            del self._groups[key]
