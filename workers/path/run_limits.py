"""How long a request may run, as Celery means it: neither its waiting nor the loading of its model counts."""

from __future__ import annotations

from collections.abc import Callable

from shared.errors import SoftTimeLimitExceeded, TimeLimitExceeded
from workers.requests.ending import Ending
from workers.requests.inflight import InFlight, TimeLimits


class RunLimits:
    """Judges what runs.

    A request goes by the limits of its message; by those ``in_force`` for all, which remote control sets, where it has
    none. A soft limit ends it too: there is nothing in an engine that could be told of it first.
    """

    def __init__(self, in_force: Callable[[], TimeLimits], clock: Callable[[], float]) -> None:
        self._in_force = in_force
        self._clock = clock

    def exceeded(self, item: InFlight) -> Ending | None:
        """How a request ends that has run for too long; ``None`` where it has not."""
        if not item.began:
            return None
        (hard, soft), (others_hard, others_soft) = item.time_limits, self._in_force()
        hard, soft = hard or others_hard, soft or others_soft
        ran = self._clock() - item.began
        if soft and ran >= soft and (not hard or soft <= hard):
            return Ending.failed(item, SoftTimeLimitExceeded(f"the request ran for its soft time limit of {soft:g} s"))
        if hard and ran >= hard:
            return Ending.failed(item, TimeLimitExceeded(f"the request ran for its time limit of {hard:g} s"))
        return None
