"""How long requests have run lately, each told apart from those that are not like it. Pure: no clock.

What is learnt is what a request took at the least, since nothing is refused that might be answered in time: a slow run
(a first one, one beside a heavy neighbour, a long answer) changes nothing once another was quicker. Runs that overlap
may have been slow for one reason, so they are one piece of evidence; it takes several, and they grow old.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass

ENOUGH = 3
"""Pieces of evidence without which nothing is said."""

KEPT = 8
"""Pieces of evidence that are remembered: the older ones are forgotten."""

RECENT_SECONDS = 60.0
"""Age after which a piece of evidence counts no longer."""

RECENT_RUNS = 4.0
"""The same for what takes long, in times of its own length."""


@dataclass(slots=True)
class _Evidence:
    """Runs that overlapped: when the first of them ended, and what the quickest took."""

    ended: float
    seconds: float


class RunTimes:
    """What like requests took. Times are in seconds, by one clock."""

    def __init__(self) -> None:
        self._seen: dict[Hashable, deque[_Evidence]] = {}

    def ran(self, like: Hashable, seconds: float, started: float, ended: float) -> None:
        """A request of this sort was answered after running for so many ``seconds`` between these times."""
        seen = self._seen.get(like)
        if seen is None:
            seen = self._seen[like] = deque(maxlen=KEPT)
        if seen and started < seen[-1].ended:
            seen[-1].seconds = min(seconds, seen[-1].seconds)
        else:
            seen.append(_Evidence(ended, seconds))

    def least(self, like: Hashable, now: float) -> float | None:
        """What the quickest of this sort took lately; ``None`` where too little is known of late."""
        seen = self._seen.get(like)
        if seen is None:
            return None
        recent = [one.seconds for one in seen if now - one.ended <= max(RECENT_SECONDS, RECENT_RUNS * one.seconds)]
        return min(recent) if len(recent) >= ENOUGH else None
