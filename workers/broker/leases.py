"""Keeps the leases of this worker, by a process of its own: a stalled interpreter cannot stop it in time.

Neither a native call that holds the interpreter's lock nor a loop that waits for something delays a renewal. What is
held lies in memory shared with that process, so that holding a lease and letting it go cost no system call.
"""

from __future__ import annotations

import json
import logging
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import IO, Protocol, cast

from shared import keys
from shared.python_path import python_path
from shared.settings import FleetSettings
from workers.broker.lease_process import Terms
from workers.broker.lease_table import LeaseTable

logger = logging.getLogger(__name__)

START_SECONDS = 10.0
RESTART_SECONDS = 1.0
"""Least time between two starts of the process."""

CLOSE_SECONDS = 1.0
READ_BYTES = 65536

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

    Leases are kept no longer than this process lives, than it runs (a stopped one's leases lapse), and than
    ``fleet.stall_seconds`` without a sign of life from the loop.
    """

    def __init__(self, fleet: FleetSettings) -> None:
        self._fleet = fleet
        self.table = LeaseTable.create()
        self._slots: dict[str, int] = {}
        self._free: list[int] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._started = float("-inf")
        self._gone: set[str] = set()
        self._unread = b""

    def hold(self, lease: str, deadline: float | None = None) -> None:
        """Keep ``lease`` until it is released, but not past ``deadline`` (seconds since the epoch)."""
        slot = self._slots.get(lease)
        if slot is None:
            if not self._free:
                self._make_room()
            slot = self._slots[lease] = self._free.pop()
        self.table.write(slot, lease, 0 if deadline is None else int(min(deadline, LATEST) * 1000))

    def _make_room(self) -> None:
        if self._process is None:
            self.start()
        self._free.extend(reversed(self.table.grow() if self._slots else self.table.slots))

    def release(self, leases: Iterable[str]) -> None:
        """Stop keeping these leases."""
        for lease in leases:
            slot = self._slots.pop(lease, None)
            if slot is not None:
                self.table.clear(slot)
                self._free.append(slot)

    # -- the process ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the process. The first lease does it too, but would have to wait for it."""
        self.table.sign()
        self._started = time.monotonic()
        terms = Terms(
            redis_url=self._fleet.redis_url,
            connect_timeout_seconds=self._fleet.connect_timeout_seconds,
            socket_timeout_seconds=self._fleet.socket_timeout_seconds,
            tls_ca_file=self._fleet.tls_ca_file,
            tls_cert_file=self._fleet.tls_cert_file,
            tls_key_file=self._fleet.tls_key_file,
            tls_verify=self._fleet.tls_verify,
            lease_seconds=self._fleet.lease_seconds,
            stall_seconds=self._fleet.stall_seconds,
            index=keys.LEASE_INDEX,
            worker=os.getpid(),
            table=self.table.descriptor,
        )
        self._unread = b""
        try:
            self._process = process = subprocess.Popen(
                [sys.executable, "-m", "workers.broker.lease_process"], env={**os.environ, "PYTHONPATH": python_path()},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[terms.table], bufsize=0,
            )  # fmt: skip
            os.set_blocking(_end(process.stdout).fileno(), False)
            _end(process.stdin).write(json.dumps(asdict(terms)).encode() + b"\n")
        except OSError as error:
            logger.error("the process that keeps leases cannot be started: %s", error)

    def wait(self) -> None:
        """Wait until the process keeps what is held, but not for ever."""
        if self._process is not None:
            poll = select.poll()
            poll.register(_end(self._process.stdout), select.POLLIN)
            poll.poll(START_SECONDS * 1000)

    def tend(self, settled: Callable[[], None] = lambda: None) -> set[str]:
        """Give a sign of life and see to the process. Returns leases that others have; they are not held any longer.

        ``settled`` releases what has been settled before it was called: that is not held any longer either.
        """
        self.table.sign()
        self._gone |= self._news()
        settled()
        lost, self._gone = self._slots.keys() & self._gone, set()
        self.release(lost)
        if lost:
            logger.warning("%d leases were lost to other workers: %s", len(lost), ", ".join(sorted(lost)[:SHOWN]))
        return lost

    def _news(self) -> set[str]:
        """What the process has said since the last time. One that has ended is started again."""
        news: bytes | None = b""
        if self._process is not None:
            news = _end(self._process.stdout).read(READ_BYTES)
        if news == b"":
            self._start_again()
        *lines, self._unread = (self._unread + (news or b"")).split(b"\n")
        return {line.decode() for line in lines}

    def _start_again(self) -> None:
        if time.monotonic() - self._started < RESTART_SECONDS:
            return
        if self._process is not None:
            logger.warning("the process that keeps leases ended (%d); it is started again", self._end_process())
        self.start()

    def close(self) -> None:
        """End the process. Leases that are still held will expire."""
        self._slots.clear()
        self._end_process()
        self.table.close()

    def _end_process(self) -> int | None:
        """End the process, which closing its input does; returns its exit status."""
        process, self._process = self._process, None
        if process is None:
            return None
        with process:  # closes its pipes
            _end(process.stdin).close()
            try:
                process.wait(CLOSE_SECONDS)
            except subprocess.TimeoutExpired:  # it waits for the broker
                process.kill()
        return process.returncode


def _end(pipe: IO[bytes] | None) -> IO[bytes]:
    """Our end of a pipe that was asked for, and so is there."""
    return cast(IO[bytes], pipe)
