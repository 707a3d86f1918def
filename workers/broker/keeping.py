"""The process beside a worker that keeps its leases, as the worker sees it: started, listened to, and replaced."""

from __future__ import annotations

import json
import logging
import os
import select
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from typing import IO, cast

from shared import keys
from shared.python_path import python_path
from shared.settings import FleetSettings
from workers.broker.lease_process import Terms, is_stopped
from workers.broker.lease_table import LeaseTable

logger = logging.getLogger(__name__)

START_SECONDS = 10.0
RESTART_SECONDS = 1.0
"""Least time between two starts of the process."""

STILL_LOOKS = 2
"""Looks in a row that find the process standing still before it is replaced: this one may have stood still as well."""

CLOSE_SECONDS = 1.0
READ_BYTES = 65536


class KeepingProcess:
    """Runs :mod:`workers.broker.lease_process` over ``table``. Used by the consumer's loop only.

    When this process dies, it gives back the leases that are known by ``token``.
    """

    def __init__(self, fleet: FleetSettings, table: LeaseTable, token: str) -> None:
        self._fleet = fleet
        self._token = token
        self._table = table
        self._process: subprocess.Popen[bytes] | None = None
        self._started = float("-inf")
        self._still = 0
        self._unread = b""

    @property
    def pid(self) -> int | None:
        """The process, where it was started."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start it; it keeps what the table holds from then on."""
        self._started = time.monotonic()
        self._table.promise(START_SECONDS)
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
            token=self._token,
            worker=os.getpid(),
            table=self._table.descriptor,
        )
        self._still, self._unread = 0, b""
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

    def news(self) -> set[str]:
        """The leases that it has found lost since the last time. One that has ended, or stands still, is replaced."""
        news: bytes | None = b""
        if self._process is not None:
            news = _end(self._process.stdout).read(READ_BYTES)
        if news == b"":
            self._replace("ended")
        elif self._stands_still():
            self._replace("stands still")
        *lines, self._unread = (self._unread + (news or b"")).split(b"\n")
        return {line.decode() for line in lines}

    def _stands_still(self) -> bool:
        """Whether it was stopped, or has not done what it does every second: it would let leases lapse unseen."""
        still = self._table.overdue_seconds() > 0 or (self.pid is not None and is_stopped(self.pid))
        self._still = self._still + 1 if still else 0
        return self._still >= STILL_LOOKS

    def _replace(self, why: str) -> None:
        if time.monotonic() - self._started < RESTART_SECONDS:
            return
        if self._process is not None:
            # Not by the end of its input, after which it would give back what is held.
            self._process.kill()
            logger.warning("the process that keeps leases %s (%s); another is started", why, self._reap())
        self.start()

    def close(self, held: int) -> None:
        """Let it end. With something ``held`` and a broker that is away it goes on for a while, to give that back."""
        process = self._process
        if process is None:
            return
        _end(process.stdin).close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(CLOSE_SECONDS)
        if not held or process.returncode is not None:
            process.kill()
            self._reap()

    def _reap(self) -> int | None:
        """Its exit status, once it has ended; ``None`` where the system takes its time."""
        process, self._process = self._process, None
        if process is None:
            return None
        for pipe in (process.stdin, process.stdout):
            _end(pipe).close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(CLOSE_SECONDS)
        return process.returncode


def _end(pipe: IO[bytes] | None) -> IO[bytes]:
    """Our end of a pipe that was asked for, and so is there."""
    return cast(IO[bytes], pipe)
