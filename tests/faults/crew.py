"""Worker processes that come and go, and the supervisor that replaces the dead."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from producer import Client
from shared.errors import BrokerUnavailable
from tests.faults import worker
from tests.support.fleet import STOP_SECONDS
from tests.support.forked import Forked
from tests.support.waiting import eventually

LOOK_SECONDS = 0.02
START_SECONDS = 60.0


class Member:
    """One worker process. ``ended`` is when its end was seen (seconds since the epoch)."""

    def __init__(self, queues: str, number: int, environ: dict[str, str], folder: Path) -> None:
        self.queues = queues
        self.number = number
        self.environ = environ
        self.log = folder / f"worker-{number}.log"
        self.started = time.time()
        self.ended: float | None = None
        self.exit_code: int | None = None
        self._process = Forked(worker.run, ["-Q", queues, "-n", f"w{number}@%h"], environ, self.log)
        self.pid = self._process.pid

    def alive(self) -> bool:
        """Whether it still runs."""
        code = self._process.poll()
        if code is not None and self.ended is None:
            self.ended, self.exit_code = time.time(), code
        return self.ended is None

    def signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        self._process.send_signal(number)

    def memory(self) -> int:
        """Bytes that it has in memory."""
        return int(psutil.Process(self.pid).memory_info().rss)


class Crew:
    """The workers of a fleet. Where ``respawning`` is on, one that ends is replaced at once by another of its name."""

    def __init__(self, folder: Path, environ: dict[str, str], client: Client) -> None:
        self.members: list[Member] = []
        self.replaced: list[Member] = []
        """Those that have ended and have a successor."""
        self.respawning = False
        self._folder = folder
        self._environ = environ
        self._client = client
        self._numbers = 0
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, name="supervisor", daemon=True)

    def __enter__(self) -> Self:
        self._supervisor.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._supervisor.join()
        self.stop()

    def start(self, count: int, queues: str = "fake", *, wait: bool = True, **environ: str) -> list[Member]:
        """Start so many workers and, unless told otherwise, wait until the fleet knows them."""
        with self._lock:
            started = [self._add(queues, self._new_number(), {**self._environ, **environ}) for _ in range(count)]
        if wait:
            self.wait_live(started)
        return started

    def wait_live(self, members: Iterable[Member] | None = None) -> None:
        """Wait until these members are in the registry; where none are named, all that run."""

        def missing() -> list[Member]:
            wanted = list(self.running() if members is None else members)
            try:
                live = {info.pid for info in self._client.fleet() if info.ready}
            except BrokerUnavailable:
                return wanted
            return [member for member in wanted if member.pid not in live]

        eventually(lambda: not missing(), START_SECONDS, "the workers' announcements")

    def running(self) -> list[Member]:
        """The members that have not ended."""
        with self._lock:
            return [member for member in self.members if member.alive()]

    def signal(self, number: int, members: Iterable[Member] | None = None) -> None:
        """Send a signal to these members, or to all."""
        with self._lock:
            for member in list(self.members) if members is None else members:
                member.signal(number)

    def kill(self, members: Iterable[Member]) -> None:
        """SIGKILL, and wait for their end."""
        members = list(members)
        self.signal(signal.SIGKILL, members)
        self.wait_ended(members, 10)

    def wait_ended(self, members: Iterable[Member], timeout: float) -> None:
        """Wait until these members have ended."""

        def ended() -> bool:
            with self._lock:
                return not sum(member.alive() for member in members)

        eventually(ended, timeout, "the workers' end")

    def stop(self) -> None:
        """End all of them, as a supervisor would: SIGTERM, and SIGKILL where that does not end them."""
        self.respawning = False
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        try:
            self.wait_ended(self.running(), STOP_SECONDS)
        finally:
            self.signal(signal.SIGKILL)

    def _new_number(self) -> int:
        self._numbers += 1
        return self._numbers

    def _add(self, queues: str, number: int, environ: dict[str, str]) -> Member:
        member = Member(queues, number, environ, self._folder)
        self.members.append(member)
        return member

    def _supervise(self) -> None:
        while not self._closed.wait(LOOK_SECONDS):
            with self._lock:
                if self.respawning:
                    for dead in [member for member in self.members if not member.alive()]:
                        self.members.remove(dead)
                        self.replaced.append(dead)
                        self._add(dead.queues, dead.number, dead.environ)
