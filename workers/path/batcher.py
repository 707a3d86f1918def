"""Micro-batching: which waiting requests run together, and when. Pure: no clock, no thread, no broker.

Requests with equal keys may share a batch. A batch is due when it is full (by requests or by tokens), when its oldest
member has waited for the timeout, or, with adaptive batching, as soon as waiting cannot pay. The last rule is for
closed loops: callers that were answered together are likely to come back together, so a partial batch waits for as many
as ran last time, but only while they keep coming: the patience between two arrivals is a small share of what a batch
takes. A lone request follows a batch of one, so it never waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
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
    """When a batch is full and how long it may wait. Times in seconds."""

    max_batch_size: int = 32
    max_batch_tokens: int = 65536
    batch_timeout: float = 0.05
    adaptive: bool = True
    min_batch_size: int = 1

    def unbatched(self) -> BatchLimits:
        """The same with batching switched off: every request by itself, at once."""
        return BatchLimits(1, self.max_batch_tokens, 0.0, True, 1)


@dataclass(frozen=True, slots=True, eq=False)
class Batch(Generic[T]):
    """Requests that run together, in the order in which they came. Equal to itself only."""

    key: Hashable
    items: list[T]
    tokens: int
    reason: FlushReason
    waited: float


@dataclass(slots=True)
class _Member(Generic[T]):
    item: T
    tokens: int
    arrived: float
    number: int


@dataclass(slots=True)
class _Group(Generic[T]):
    members: deque[_Member[T]] = field(default_factory=deque)
    tokens: int = 0
    last_arrival: float = 0.0


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
        self._added = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[T]:
        return (member.item for group in self._groups.values() for member in group.members)

    def add(self, item: T, key: Hashable, tokens: int, now: float) -> None:
        """Let a request of ``tokens`` tokens wait with the others of its key."""
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group()
        group.members.append(_Member(item, tokens, now, self._added))
        group.tokens += tokens
        group.last_arrival = now
        self._size += 1
        self._added += 1

    def next_batch(self, now: float) -> Batch[T] | None:
        """The batch that is due and has waited longest, or ``None``. Ask when an engine is free to run it."""
        for key, group in sorted(self._groups.items(), key=lambda entry: entry[1].members[0].number):
            reason = self._due(key, group, now)
            if reason is not None:
                return self._form(key, group, reason, now)
        return None

    def due_at(self, now: float) -> float | None:
        """When to ask :meth:`next_batch` again if nothing else happens; ``None`` when nothing waits."""
        return min((self._due_time(key, group, now) for key, group in self._groups.items()), default=None)

    def finished(self, key: Hashable, size: int, duration: float) -> None:
        """Learn from a batch that ran: how many it had and how many seconds it took."""
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
            removed.extend(member.item for member in group.members if unwanted(member.item))
            group.members = kept
            group.tokens = sum(member.tokens for member in kept)
            if not kept:
                del self._groups[key]
        self._size -= len(removed)
        return removed

    def drain(self) -> list[T]:
        """Take out everything that waits, in the order of arrival."""
        members = sorted(
            (member for group in self._groups.values() for member in group.members), key=lambda member: member.number
        )
        self._groups.clear()
        self._size = 0
        return [member.item for member in members]

    # -- rules ------------------------------------------------------------------------------------------------------

    def _due(self, key: Hashable, group: _Group[T], now: float) -> FlushReason | None:
        limits = self.limits
        if len(group.members) >= limits.max_batch_size:
            return FlushReason.SIZE
        if group.tokens >= limits.max_batch_tokens:
            return FlushReason.TOKENS
        if now >= group.members[0].arrived + limits.batch_timeout:
            return FlushReason.TIMEOUT
        if limits.adaptive and now >= self._idle_time(key, group):
            return FlushReason.IDLE
        return None

    def _due_time(self, key: Hashable, group: _Group[T], now: float) -> float:
        if len(group.members) >= self.limits.max_batch_size or group.tokens >= self.limits.max_batch_tokens:
            return now
        timeout = group.members[0].arrived + self.limits.batch_timeout
        return min(timeout, self._idle_time(key, group)) if self.limits.adaptive else timeout

    def _idle_time(self, key: Hashable, group: _Group[T]) -> float:
        """From when on waiting cannot pay."""
        if len(group.members) < self.limits.min_batch_size:
            return float("inf")
        history = self._history.get(key)
        expected = min(history.size, self.limits.max_batch_size) if history else 1
        if history is None or len(group.members) >= expected:
            return group.last_arrival
        return group.last_arrival + PATIENCE_SHARE * history.duration

    def _form(self, key: Hashable, group: _Group[T], reason: FlushReason, now: float) -> Batch[T]:
        limits = self.limits
        waited = now - group.members[0].arrived
        items: list[T] = []
        tokens = 0
        while group.members and len(items) < limits.max_batch_size:
            member = group.members[0]
            if items and tokens + member.tokens > limits.max_batch_tokens:
                reason = FlushReason.TOKENS
                break
            group.members.popleft()
            items.append(member.item)
            tokens += member.tokens
        group.tokens -= tokens
        self._size -= len(items)
        if not group.members:
            del self._groups[key]
        return Batch(key, items, tokens, reason, waited)
