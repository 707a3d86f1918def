"""The process that keeps a worker's leases: ``python -m workers.broker.lease_process``.

:mod:`workers.broker.keeping` starts it.

On its standard input it is given its :class:`Terms` as a line of JSON, for a broker's URL may hold a password, and then
nothing more: the end of the input is the end of the worker. It answers with an empty line once it keeps what the table
holds, and then with a line for each lease that it finds lost. When the worker is gone, it gives back what that had
leased, and ends.

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
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from workers.broker.lease_table import LeaseTable

logger = logging.getLogger(__name__)

AT_ONCE = 512
"""Leases that one command renews."""

LOOK_SECONDS = 1.0
"""How often the table is looked at, and the worker shown that this process runs."""

RETRY_SECONDS = 1.0
"""How soon it is tried again where leases could not, or were not to be, renewed; with short leases it is sooner."""

LATE_SECONDS = 2.0
"""How late a look may be on a machine that is busy with other things."""

ANSWERS = 3
"""Answers of the broker that one command may wait for, where it has to connect first."""

INPUT, OUTPUT = 0, 1


@dataclass(frozen=True, slots=True)
class Terms:
    """What the process must know.

    ``index`` is the leases' key, ``token`` what the worker's leases are known by, ``worker`` its process, ``table`` a
    file's descriptor.
    """

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
    token: str
    worker: int
    table: int

    @property
    def command_seconds(self) -> float:
        """How long a command may take at the most."""
        return self.connect_timeout_seconds + ANSWERS * self.socket_timeout_seconds


class Broker(Protocol):
    """What the process asks of the broker. Each raises :class:`OSError` where it is not done."""

    def renew(self, held: Sequence[tuple[str, int]]) -> Sequence[str]:
        """Renew leases, each no longer than its ms since the epoch (0: no such time); returns those that are lost."""

    def let_go(self) -> int:
        """Let all leases of the worker expire now, those of claims under way too; returns how many there were."""


class Keeping:
    """Renews what the table holds, for as long as the worker lives, runs and gives signs of life; then lets it go."""

    def __init__(self, terms: Terms, table: LeaseTable, broker: Broker) -> None:
        self._terms = terms
        self._table = table
        self._broker = broker
        self._interval = terms.lease_seconds / 3
        self._retry = min(RETRY_SECONDS, self._interval / 3)
        self._trouble = ""
        self._watched = select.poll()
        self._watched.register(INPUT, select.POLLIN)
        if hasattr(os, "pidfd_open"):  # else a process that the worker has forked may hold its end of the pipe for long
            with suppress(OSError):
                self._watched.register(os.pidfd_open(terms.worker), select.POLLIN)

    def run(self) -> None:
        """Renew every third of the lease's length until the worker is gone."""
        _say("")
        due = time.monotonic()
        while not self._worker_ended(due):
            if time.monotonic() >= due:
                due = self._next(self._round())
        self._let_go()

    def _worker_ended(self, due: float) -> bool:
        """Wait until ``due``, but not longer than until the next look; whether the worker ended meanwhile."""
        wait = min(LOOK_SECONDS, max(0.0, due - time.monotonic()))
        self._table.promise(wait + LATE_SECONDS)
        return bool(self._watched.poll(math.ceil(wait * 1000))) or os.getppid() != self._terms.worker

    def _next(self, took: float) -> float:
        """When to renew next, after a round that took so many seconds."""
        if self._trouble:
            return time.monotonic() + self._retry
        if took > self._interval:
            logger.warning("keeping the leases took %.1f s: the broker is slow", took)
        return time.monotonic() + max(0.0, self._interval - took)

    def _round(self) -> float:
        """Renew once; returns the seconds it took."""
        started = time.monotonic()
        held = self._table.read()
        trouble = self._not_to_be_kept() if held else ""
        try:
            for first in range(0, 0 if trouble else len(held), AT_ONCE):
                self._table.promise(self._terms.command_seconds + LATE_SECONDS)
                for lost in self._broker.renew(held[first : first + AT_ONCE]):
                    _say(lost)
        except OSError as error:
            trouble = f"cannot keep leases: {error}"
        if trouble and not self._trouble:
            logger.warning("%s (%d held)", trouble, len(held))
        self._trouble = trouble
        return time.monotonic() - started

    def _not_to_be_kept(self) -> str:
        """Why the worker's leases are to lapse; empty where they are not."""
        if is_stopped(self._terms.worker):
            return "the worker was stopped: its leases lapse"
        if self._table.silent_seconds() > self._terms.stall_seconds:
            return f"the worker gave no sign of life for {self._terms.stall_seconds:.0f} s: its leases lapse"
        return ""

    def _let_go(self) -> None:
        """The worker is gone: let what it held be taken over now. Where the broker is away, until it has lapsed."""
        until = time.monotonic() + self._terms.lease_seconds
        while time.monotonic() < until:
            try:
                if there := self._broker.let_go():
                    logger.warning("the worker is gone: the %d leases it held are given back", there)
                return
            except OSError as error:
                logger.warning("the worker is gone; cannot give back its leases: %s", error)
                time.sleep(self._retry)


def _say(line: str) -> None:
    # A worker that does not listen holds nothing up; what it is not told now it is told next time.
    with suppress(BlockingIOError, BrokenPipeError):
        os.write(OUTPUT, f"{line}\n".encode())


def is_stopped(pid: int) -> bool:
    """Whether a signal or a debugger has stopped a process; ``False`` where the system does not say."""
    try:
        status = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False
    return status.rpartition(b")")[2].split()[0] in (b"T", b"t")


class RedisBroker:
    """The broker over a connection of its own."""

    def __init__(self, terms: Terms) -> None:
        from shared.broker import connect, lua

        client = connect(terms)
        self._index, self._token = terms.index, terms.token
        self._lease_ms = int(terms.lease_seconds * 1000)
        self._renew = client.register_script(lua("workers.broker", "renew"))
        self._let_go = client.register_script(lua("workers.broker", "let_go"))

    def renew(self, held: Sequence[tuple[str, int]]) -> list[str]:
        """Renew leases; returns those that are lost."""
        words = [word for entry in held for word in entry]
        return [lease.decode() for lease in self._ask(self._renew, [self._lease_ms, *words])]

    def let_go(self) -> int:
        """Let all leases of the worker expire now; returns how many there were."""
        return int(self._ask(self._let_go, [self._token, self._lease_ms]))

    def _ask(self, script: Any, args: Sequence[str | int]) -> Any:
        import redis

        try:
            return script(keys=[self._index], args=args)
        except redis.RedisError as error:
            raise ConnectionError(str(error)) from error


def main() -> None:
    """Keep leases until the input ends. Signals are the worker's to heed: its leases are kept while it drains."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(format="[%(asctime)s: %(levelname)s/lease-process] %(message)s")
    line = sys.stdin.readline()
    if not line:
        return
    terms = Terms(**json.loads(line))
    os.set_blocking(OUTPUT, False)
    table = LeaseTable(os.fdopen(terms.table, "r+b", buffering=0))
    Keeping(terms, table, RedisBroker(terms)).run()


if __name__ == "__main__":
    main()
