"""Keeps the leases of this worker, by a process of its own: a stalled interpreter cannot stop it in time.

Neither a native call that holds the interpreter's lock nor a loop that waits for something delays a renewal. What is
held lies in memory shared with that process, so that holding a lease and letting it go cost no system call. When this
process dies, the other gives back at once what it held.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Protocol

from shared.settings import FleetSettings
from workers.broker.keeping import KeepingProcess
from workers.broker.lease_table import LeaseTable

logger = logging.getLogger(__name__)

SHOWN = 10
"""Lost leases that the log names."""

LATEST = 1e11
"""Seconds since the epoch that never come. A deadline may lie in the future as far as its sender likes."""


class Leases(Protocol):
    """The leases that a worker holds, as those see them who take requests over and end them."""

    def hold(self, lease: str, deadline: float | None = None) -> None:
        """Keep ``lease`` until it is released, but not past ``deadline`` (seconds since the epoch)."""

    def release(self, leases: Iterable[str]) -> None:
        """Stop keeping these leases."""


class LeaseKeeper:
    """Keeps what it is told to hold. Used by the consumer's loop only, which is to call :meth:`tend` regularly.

    ``token`` is what the leases of this process are known by (:mod:`workers.broker.lease_ids`).

    Leases are kept no longer than this process lives, than it runs (a stopped one's leases lapse), and than
    ``fleet.stall_seconds`` without a sign of life from the loop.
    """

    def __init__(self, fleet: FleetSettings, token: str) -> None:
        self.table = LeaseTable.create()
        self.process = KeepingProcess(fleet, self.table, token)
        self._slots: dict[str, int] = {}
        self._free: list[int] = []
        self._gone: set[str] = set()

    def hold(self, lease: str, deadline: float | None = None) -> None:
        """Keep ``lease`` until it is released, but not past ``deadline`` (seconds since the epoch)."""
        slot = self._slots.get(lease)
        if slot is None:
            if not self._free:
                self._make_room()
            slot = self._slots[lease] = self._free.pop()
        self.table.write(slot, lease, 0 if deadline is None else int(min(deadline, LATEST) * 1000))

    def _make_room(self) -> None:
        if self.process.pid is None:
            self.start()
        self._free.extend(reversed(self.table.grow() if self._slots else self.table.slots))

    def release(self, leases: Iterable[str]) -> None:
        """Stop keeping these leases."""
        for lease in leases:
            slot = self._slots.pop(lease, None)
            if slot is not None:
                self.table.clear(slot)
                self._free.append(slot)

    def start(self) -> None:
        """Start the process. The first lease does it too, but would have to wait for it."""
        self.table.sign()
        self.process.start()

    def wait(self) -> None:
        """Wait until the process keeps what is held, but not for ever."""
        self.process.wait()

    def tend(self, settled: Callable[[], None] = lambda: None) -> set[str]:
        """Give a sign of life and see to the process. Returns leases that others have; they are not held any longer.

        ``settled`` releases what has been settled before it was called: that is not held any longer either.
        """
        self.table.sign()
        self._gone |= self.process.news()
        settled()
        lost, self._gone = self._slots.keys() & self._gone, set()
        self.release(lost)
        if lost:
            logger.warning("%d leases were lost to other workers: %s", len(lost), ", ".join(sorted(lost)[:SHOWN]))
        return lost

    def close(self) -> None:
        """End the process. Leases that are still held are given back."""
        self.process.close(held=len(self._slots))
        self._slots.clear()
        self.table.close()
