"""What the ids of leases are made of: ``<counter>-<token>[/<tenant>]``.

The broker's counter puts leases in order, but does not make an id unique: after a failover, or a restart without its
last writes, it counts again what it counted before, and a lease's old holder would end that of somebody else.
"""

from __future__ import annotations

import secrets
from itertools import count


class LeaseTokens:
    """Words that no other process makes, and this one once. They begin with ``process``, the same for all of them."""

    def __init__(self) -> None:
        self.process = secrets.token_hex(5)
        self._calls = count()

    def __call__(self) -> str:
        """The next one: for the leases of one claim, or one sweep."""
        return f"{self.process}{next(self._calls):x}"


def order(lease: str) -> int:
    """The place of a lease among the others: those that were made later have higher ones."""
    return int(lease.partition("-")[0])
