"""The circuit breaker: an engine that keeps failing with a model is rested, so that requests stop visiting it.

Pure: the clock is passed in. Closed until ``failures`` in a row, or one outage. Then open for ``rest_seconds``, doubled
each time it opens again. Then half open: one failure opens it again, one success closes it.
"""

from __future__ import annotations

from enum import StrEnum

from shared.errors import EngineDied, FleetError
from shared.settings import BreakerSettings


class State(StrEnum):
    """Whether requests may come."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class CircuitBreaker:
    """One model of one engine. Times are in seconds of any steady clock."""

    def __init__(self, settings: BreakerSettings) -> None:
        self.settings = settings
        self._failures = 0
        self._openings = 0
        self.state = State.CLOSED
        self.error: FleetError | None = None
        self.due = float("inf")

    def succeeded(self) -> None:
        """A request was answered."""
        self.state = State.CLOSED
        self._failures = self._openings = 0
        self.error = None

    def failed(self, error: FleetError, now: float) -> bool:
        """A request failed with an engine's error; whether that opened the breaker."""
        if self.state is State.OPEN:
            return False
        self._failures += 1
        if not error.outage and self.state is State.CLOSED and self._failures < self.settings.failures:
            return False
        rest = min(self.settings.rest_seconds * 2**self._openings, self.settings.longest_rest_seconds)
        if isinstance(error, EngineDied) and self._openings == 0:
            rest = 0.0  # a process that dies once is started again at once
        self._failures = 0
        self._openings += 1
        self.state = State.OPEN
        self.error = error
        self.due = now + rest
        return True

    def try_again(self) -> None:
        """The rest is over and a trial went well: let requests come, on probation."""
        self.state = State.HALF_OPEN
        self.error = None
        self.due = float("inf")
