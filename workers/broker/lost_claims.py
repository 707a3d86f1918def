"""Claims whose answers did not come: the broker may have leased messages to this process, which does not know of them.

It is the network's fault, and no delivery: what such a claim has leased goes back to its queue as it was, as soon as
the broker answers again, and does not wait for its lease to lapse.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence

from workers.broker import lease_ids

logger = logging.getLogger(__name__)

AGAIN_SECONDS = 1.0
"""How often it is looked for: a broker that stood still, or a slow network, may carry a claim out later."""

Find = Callable[[Sequence[str]], Sequence[str]]
"""The leases that claims with these tokens have made."""


class LostClaims:
    """Remembers lost claims for as long as what they leased stays leased. From any thread."""

    def __init__(self, find: Find, lease_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._find = find
        self._lease_seconds = lease_seconds
        self._clock = clock
        self._tokens: deque[tuple[str, float]] = deque()
        self._next = 0.0

    def add(self, token: str) -> None:
        """The answer of the claim with this token will not come."""
        self._tokens.append((token, self._clock() + self._lease_seconds))
        self._next = 0.0

    def leases(self) -> list[str]:
        """What is leased by such claims, the oldest first; to be given back. Raises what a broker that fails raises."""
        now = self._clock()
        if not self._tokens or now < self._next:
            return []
        tokens = list(self._tokens)
        found = sorted(self._find([token for token, _ in tokens]), key=lease_ids.order)
        self._next = now + AGAIN_SECONDS
        while self._tokens and self._tokens[0][1] <= now:
            self._tokens.popleft()
        if found:
            logger.warning("%d messages were leased by claims whose answers were lost; they go back", len(found))
        return found
