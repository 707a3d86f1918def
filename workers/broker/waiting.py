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
from workers.broker.delivery import LEFT_OUT_SECONDS, Claim

SILENCE_SECONDS = 1.0
"""How long a claim may be under way before the broker counts as gone, when somebody looks."""


class Waiting:
    """What a consumer knows of its queues. A queue that is not known to be empty may hold messages."""

    def __init__(self) -> None:
        self._asked: dict[str, float] = {}
        self._empty: set[str] = set()
        self._look_at: dict[str, float] = {}
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
        if claim.left_out and not claim.waiting:
            self._look_at[queue] = time.monotonic() + LEFT_OUT_SECONDS
        else:
            self._look_at.pop(queue, None)
        return time.monotonic() - self._asked.pop(queue)

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
        self._empty -= changed
        return bool(changed)

    def silent(self) -> bool:
        """Whether the broker owes the answer to a claim for too long."""
        now = time.monotonic()
        return any(now - asked > SILENCE_SECONDS for asked in self._asked.values())
