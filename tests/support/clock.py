"""Time that passes when a test says so."""

from __future__ import annotations

START = 1_800_000_000.0


class ManualClock:
    """Seconds since the epoch."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let so many seconds pass, to the millisecond: what a broker counts in."""
        self.now = round(self.now + seconds, 3)
