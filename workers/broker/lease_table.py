"""The leases that a worker holds, in memory that it shares with the process that keeps them.

The worker writes and the other process reads; neither waits for the other. An entry is written by one call, so that no
thread that stalls the interpreter can leave it half done, and it carries a checksum: a reader that comes in the middle
of the writing sees that it did.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
import time
from typing import BinaryIO
from zlib import crc32

SLOT_BYTES = 256
FIRST_SLOTS = 256
LONGEST_LEASE = 240
"""Bytes of the longest lease id that a slot takes."""

READS = 100

# The worker's last sign of life, and when the other process gives its next one at the latest; in ns of the machine's
# steady clock.
_SIGN, _PROMISE = struct.Struct("q"), struct.Struct("q")
_PROMISED = _SIGN.size  # its place
_SLOT = struct.Struct(f"BIq{LONGEST_LEASE}s")  # length of the lease's id (0: free), checksum, last moment, id
_FREE = bytes(struct.calcsize("BI"))
_PRIME = 2**32 - 5  # a checksum starts from a number below 2 ** 32


class LeaseTable:
    """A table over a file without a name; :meth:`create` makes one.

    The first slot is the head; those of leases have numbers from 1 on. Which are free is for the writer to know.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._map = mmap.mmap(file.fileno(), 0)

    @classmethod
    def create(cls) -> LeaseTable:
        """An empty table, in memory alone where the system has such files."""
        file: BinaryIO
        if hasattr(os, "memfd_create"):
            file = os.fdopen(os.memfd_create("leases"), "r+b", buffering=0)
        else:
            file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  # closed with the table
        file.truncate(SLOT_BYTES * (1 + FIRST_SLOTS))
        table = cls(file)
        table.sign()
        return table

    @property
    def descriptor(self) -> int:
        """The file, for the process that reads."""
        return self._file.fileno()

    @property
    def slots(self) -> range:
        """The numbers of all slots."""
        return range(1, len(self._map) // SLOT_BYTES)

    def close(self) -> None:
        """Let go of the memory."""
        self._map.close()
        self._file.close()

    # -- the worker -------------------------------------------------------------------------------------------------

    def sign(self) -> None:
        """Give a sign of life."""
        _SIGN.pack_into(self._map, 0, time.monotonic_ns())

    def overdue_seconds(self) -> float:
        """How long ago the other process was to give its next sign of life; negative where it is still to come."""
        (latest,) = _PROMISE.unpack_from(self._map, _PROMISED)
        return float(time.monotonic_ns() - latest) / 1e9

    def write(self, slot: int, lease: str, last_ms: int) -> None:
        """Hold a lease, no longer than ``last_ms`` (ms since the epoch; 0: no such time)."""
        name = lease.encode()
        if len(name) > LONGEST_LEASE:
            raise ValueError(f"a lease id of {len(name)} bytes; at most {LONGEST_LEASE} fit")
        _SLOT.pack_into(self._map, slot * SLOT_BYTES, len(name), crc32(name, last_ms % _PRIME), last_ms, name)

    def clear(self, slot: int) -> None:
        """Hold the lease in this slot no longer. Its checksum goes too: what is written next is not to find it."""
        self._map[slot * SLOT_BYTES : slot * SLOT_BYTES + len(_FREE)] = _FREE

    def grow(self) -> range:
        """Double the number of slots; returns the new ones. A reader finds them by itself."""
        old = self.slots
        self._file.truncate(SLOT_BYTES * (1 + 2 * len(old)))
        self._map = mmap.mmap(self.descriptor, 0)
        return range(old.stop, self.slots.stop)

    # -- the process that keeps what is held ------------------------------------------------------------------------

    def silent_seconds(self) -> float:
        """How long ago the worker gave its last sign of life."""
        (last,) = _SIGN.unpack_from(self._map)
        return float(time.monotonic_ns() - last) / 1e9

    def promise(self, seconds: float) -> None:
        """Say that this process lives, and that it says so again within this time."""
        _PROMISE.pack_into(self._map, _PROMISED, time.monotonic_ns() + int(seconds * 1e9))

    def read(self) -> list[tuple[str, int]]:
        """The leases that are held, each with the ms since the epoch past which it is not to be kept (0: none)."""
        if self._map.size() > len(self._map):
            self._map = mmap.mmap(self.descriptor, 0)
        return [entry for slot in self.slots if (entry := self._entry(slot)) is not None]

    def _entry(self, slot: int) -> tuple[str, int] | None:
        start = slot * SLOT_BYTES
        for _ in range(READS):
            length, checksum, last_ms, padded = _SLOT.unpack(self._map[start : start + SLOT_BYTES])
            if not length:
                return None
            name = padded[:length]
            if crc32(name, last_ms % _PRIME) == checksum:
                return name.decode(), last_ms
        return None  # its writer stands still in the middle of it; at the next reading it may be whole
