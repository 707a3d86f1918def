"""A submitted request, as either client keeps it for its handle."""

from __future__ import annotations

import time
from collections.abc import Callable

from producer.client.records import Outcome
from producer.client.steps import AnyFuture

DEADLINE_GRACE_SECONDS = 5.0
"""How long after a request's deadline a worker may take to say that it has passed."""


class Submitted:
    """A request that was submitted, and its outcome as soon as that is ``known``.

    What was known before a fork, or in another loop, is known here too. ``table`` tells the outcome; ``future`` is
    there where somebody has waited. The ``deadline`` is by ``clock``, the broker's, in seconds since the epoch.
    """

    __slots__ = ("__weakref__", "_clock", "_grace", "deadline", "future", "id", "known", "table")

    def __init__(
        self,
        request_id: str,
        future: AnyFuture | None = None,
        deadline: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._clock = clock
        self.id = request_id
        self.future = future
        self.deadline = deadline
        self._grace = 0.0
        self.known: Outcome | None = None
        self.table: object = None

    def late(self) -> bool:
        """Whether the request's deadline has passed."""
        return self.deadline is not None and self._clock() >= self.deadline

    def wait_longer(self) -> None:
        """Its deadline has passed, but a worker may be about to say so."""
        self._grace = DEADLINE_GRACE_SECONDS

    def abandoned_in(self) -> float:
        """Seconds until an answer is not to be expected any more."""
        return float("inf") if self.deadline is None else self.deadline + self._grace - self._clock()
