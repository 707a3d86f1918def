"""Waiting for messages without popping any: what is known of each queue, and so which are worth a claim.

A claim on a pipelined connection says whether more is left. Where nothing is, the broker tells that connection, once,
when one of the queue's lists changes. No payload travels before it is leased, a worker that dies in its sleep takes
nothing with it, and one that is frozen holds nothing up: all that wait are told, and the first to claim has the
message.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable

from shared import keys
from workers.broker.delivery import Claim

_IN_FLIGHT = keys.IN_FLIGHT.encode()

SILENCE_SECONDS = 1.0
"""How long a claim may be under way before the broker counts as gone, when somebody looks."""


PACE_SECONDS = 0.05
"""Least time between two looks at a queue where all that waits is of tenants that have their share of what is in
flight: each request of theirs that ends or starts anywhere is news."""

LEFT_OUT_SECONDS = 2.0
"""After how long such a queue is looked at without news. Shares change with the size of the fleet."""


class Waiting:
    """What a consumer knows of its queues. A queue that is not known to be empty may hold messages."""

    def __init__(self) -> None:
        self._asked: dict[str, float] = {}
        self._empty: set[str] = set()
        self._look_at: dict[str, float] = {}
        self._left_out: dict[str, float] = {}  # where tenants have their share: when news of it is taken up again
        self._known: set[str] = set()
        self._queues: dict[bytes, str] = {}

    def due(self, queues: Iterable[str]) -> list[str]:
        """Those of these queues that are to be claimed from now."""
        if self._look_at:
            now = time.monotonic()
            for queue in [queue for queue, when in self._look_at.items() if now >= when]:
                del self._look_at[queue]
                self._empty.discard(queue)
        return [queue for queue in queues if queue not in self._empty and queue not in self._asked]

    def asked(self, queue: str) -> None:
        """A claim is under way."""
        self._asked[queue] = time.monotonic()
        if queue not in self._known:
            self._known.add(queue)
            self._queues.update((name.encode(), queue) for name in (*keys.lists_of(queue), *keys.lanes_of(queue)))

    def answered(self, queue: str, claim: Claim) -> float:
        """The claim has come back; returns the seconds that it took."""
        if not claim.waiting:
            self._empty.add(queue)
        now = time.monotonic()
        if claim.left_out and not claim.waiting:
            self._look_at[queue] = now + LEFT_OUT_SECONDS
            self._left_out[queue] = now if claim.messages else now + PACE_SECONDS
        else:
            self._look_at.pop(queue, None)
            self._left_out.pop(queue, None)
        return now - self._asked.pop(queue)

    def lost(self, queue: str) -> None:
        """The claim will not come back."""
        self._asked.pop(queue, None)

    def doubt(self, queue: str) -> None:
        """The queue may hold messages."""
        self._empty.discard(queue)

    def changed(self, names: Collection[bytes] | None) -> bool:
        """These keys have changed in the broker (``None``: any may have); whether a queue may hold messages now."""
        if names is None:
            self._empty.clear()
            return True
        changed = {self._queues[name] for name in names if name in self._queues}
        if self._left_out:
            if _IN_FLIGHT in names:
                changed |= self._left_out.keys()
            now = time.monotonic()
            for queue in [queue for queue in changed if now < self._left_out.get(queue, now)]:
                self._look_at[queue] = min(self._left_out[queue], self._look_at.get(queue, float("inf")))
                changed.remove(queue)
        self._empty -= changed
        return bool(changed)

    def freed(self) -> bool:
        """Requests of tenants have ended here; whether a queue may hold messages now that it did not offer before."""
        before = len(self._empty)
        self._empty -= self._left_out.keys()
        return len(self._empty) < before

    def wake_at(self) -> float | None:
        """When a queue is to be looked at next without news, by the steady clock."""
        return min(self._look_at.values(), default=None)

    def silent(self) -> bool:
        """Whether the broker owes the answer to a claim for too long."""
        now = time.monotonic()
        return any(now - asked > SILENCE_SECONDS for asked in self._asked.values())
