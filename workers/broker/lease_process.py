"""The process that keeps a worker's leases: ``python -m workers.broker.lease_process``.

:mod:`workers.broker.leases` starts it.

On its standard input it is given its :class:`Terms` as a line of JSON, for a broker's URL may hold a password, and then
nothing more: the end of the input is the end of the worker. It answers with an empty line once it keeps what the table
holds, and then with a line for each lease that it finds lost.

It is small and starts quickly, so it imports nothing of the contract, of Celery or of the engines.
"""

from __future__ import annotations

import json
import logging
import math
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from workers.broker.lease_table import LeaseTable

logger = logging.getLogger(__name__)

AT_ONCE = 512
"""Leases that one command renews."""

RETRY_SECONDS = 1.0
"""How soon it is tried again where leases could not, or were not to be, renewed; with short leases it is sooner."""

INPUT, OUTPUT = 0, 1


@dataclass(frozen=True, slots=True)
class Terms:
    """What the process must know: ``index`` is the leases' key, ``worker`` a process, ``table`` a file's descriptor."""

    redis_url: str
    connect_timeout_seconds: float
    socket_timeout_seconds: float
    tls_ca_file: str | None
    tls_cert_file: str | None
    tls_key_file: str | None
    tls_verify: bool
    lease_seconds: float
    stall_seconds: float
    index: str
    worker: int
    table: int


Renew = Callable[[Sequence[tuple[str, int]]], Sequence[str]]
"""Renews leases, each no longer than its ms since the epoch (0: no such time); returns those that are lost.

Raises :class:`OSError` where the broker does not do it.
"""


class Renewer:
    """Renews what the table holds, for as long as the worker lives, runs and gives signs of life."""

    def __init__(self, terms: Terms, table: LeaseTable, renew: Renew) -> None:
        self._terms = terms
        self._table = table
        self._renew = renew
        self._interval = terms.lease_seconds / 3
        self._retry = min(RETRY_SECONDS, self._interval / 3)
        self._trouble = ""

    def run(self) -> None:
        """Renew every third of the lease's length until the worker is gone."""
        _say("")
        wait = 0.0
        while not self._worker_ended(wait):
            started = time.monotonic()
            kept = self._round()
            took = time.monotonic() - started
            if took > self._interval:
                logger.warning("keeping the leases took %.1f s: the broker is slow", took)
            wait = max(0.0, self._interval - took) if kept else self._retry

    def _worker_ended(self, seconds: float) -> bool:
        """Wait so long; whether the worker ended meanwhile. What it forked may hold its end of the pipe."""
        poll = select.poll()
        poll.register(INPUT, select.POLLIN)
        return bool(poll.poll(math.ceil(seconds * 1000))) or os.getppid() != self._terms.worker

    def _round(self) -> bool:
        """Renew once; ``False`` where it is to be tried again soon."""
        held = self._table.read()
        if not held:
            return True
        trouble = self._not_to_be_kept()
        try:
            for first in range(0, 0 if trouble else len(held), AT_ONCE):
                for lost in self._renew(held[first : first + AT_ONCE]):
                    _say(lost)
        except OSError as error:
            trouble = f"cannot keep leases: {error}"
        if trouble and not self._trouble:
            logger.warning("%s (%d held)", trouble, len(held))
        self._trouble = trouble
        return not trouble

    def _not_to_be_kept(self) -> str:
        """Why the worker's leases are to lapse; empty where they are not."""
        if _is_stopped(self._terms.worker):
            return "the worker was stopped: its leases lapse"
        if self._table.silent_seconds() > self._terms.stall_seconds:
            return f"the worker gave no sign of life for {self._terms.stall_seconds:.0f} s: its leases lapse"
        return ""


def _say(line: str) -> None:
    # A worker that does not listen holds nothing up; what it is not told now it is told next time.
    with suppress(BlockingIOError, BrokenPipeError):
        os.write(OUTPUT, f"{line}\n".encode())


def _is_stopped(pid: int) -> bool:
    """Whether a signal or a debugger has stopped a process; ``False`` where the system does not say."""
    try:
        status = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False
    return status.rpartition(b")")[2].split()[0] in (b"T", b"t")


def main() -> None:
    """Keep leases until the input ends. Signals are the worker's to heed: its leases are kept while it drains."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    import redis

    from shared.broker import connect, lua

    logging.basicConfig(format="[%(asctime)s: %(levelname)s/lease-process] %(message)s")
    line = sys.stdin.readline()
    if not line:
        return
    terms = Terms(**json.loads(line))
    os.set_blocking(OUTPUT, False)
    script = connect(terms).register_script(lua("workers.broker", "renew"))
    lease_ms = int(terms.lease_seconds * 1000)

    def renew(held: Sequence[tuple[str, int]]) -> list[str]:
        words = [word for entry in held for word in entry]
        try:
            return [lease.decode() for lease in script(keys=[terms.index], args=[lease_ms, *words])]
        except redis.RedisError as error:
            raise ConnectionError(str(error)) from error

    table = LeaseTable(os.fdopen(terms.table, "r+b", buffering=0))
    Renewer(terms, table, renew).run()


if __name__ == "__main__":
    main()
