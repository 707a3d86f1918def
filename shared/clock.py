"""The broker's clock, as one process knows it: deadlines and delays are reckoned by it, the only one that all share.

What the broker answers says what time it was there; how long the answer took, how exactly. In between time is counted
by the process' steady clock, so that a step of its own clock moves nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

DRIFT = 1e-3
"""Seconds by which two clocks may go apart in a second."""

STEP_SECONDS = 0.25
"""By how much the clocks of a process may go apart before it is a step of one of them, or the machine was suspended."""

SKEW_SECONDS = 1.0
"""How wrong a machine's clock may be before that is worth a warning."""


def _wall() -> float:
    return time.time()


def _steady() -> float:
    return time.monotonic()


@dataclass(frozen=True, slots=True)
class _Measured:
    """What was measured last: by how much the broker's clock is ahead of the steady one, how exactly, and when."""

    offset: float
    error: float
    at: float
    apart: float
    """The process' clock less its steady one."""


class BrokerClock:
    """Tells the broker's time in seconds since the epoch; before any answer, the process' own. From any thread.

    ``wall`` is the process' clock, ``steady`` one that never steps.
    """

    def __init__(self, wall: Callable[[], float] = _wall, steady: Callable[[], float] = _steady) -> None:
        self.steady = steady
        self._wall = wall
        self._known: _Measured | None = None

    def __call__(self) -> float:
        """The broker's time."""
        return self.offset + self.steady()

    @property
    def offset(self) -> float:
        """By how much the broker's clock is ahead of the steady one."""
        known = self._known
        return self._wall() - self.steady() if known is None else known.offset

    @property
    def ahead(self) -> float | None:
        """By how many seconds the process' clock is ahead of the broker's; ``None`` where that is not known."""
        return None if self._known is None else self._wall() - self()

    @property
    def doubtful(self) -> bool:
        """Whether it had better be measured anew: it never was, or a clock of this process has stepped since."""
        known = self._known
        return known is None or abs(self._wall() - self.steady() - known.apart) > STEP_SECONDS

    def learn(self, broker: float, asked: float, answered: float) -> None:
        """The broker's time was ``broker`` between two moments of the steady clock.

        An answer that took long is believed only where it says more than what is known.
        """
        error = max(0.0, answered - asked) / 2
        new = _Measured(broker - (asked + answered) / 2, error, answered, self._wall() - answered)
        known = self._known
        if known is not None and not self.doubtful:
            certain = known.error + DRIFT * max(0.0, answered - known.at)
            if error > certain and abs(new.offset - known.offset) <= error + certain:
                return
        self._known = new

    def from_here(self, moment: float) -> float:
        """A moment of the process' own clock, by the broker's."""
        return moment + self() - self._wall()

    def to_here(self, moment: float) -> float:
        """A moment of the broker's clock, by the process' own."""
        return moment - self() + self._wall()
