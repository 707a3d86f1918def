"""When an engine is taken to hang, and when it is not."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from shared.settings import WatchdogSettings
from tests.support.clock import ManualClock
from tests.support.waiting import eventually
from workers.process.activity import Work, work_done
from workers.process.watchdog import Doing, Watchdog

SETTINGS = WatchdogSettings(idle_seconds=100, busy_seconds=1000)
CALL = Doing(None, 1.0)
LOAD = Doing("big", 0.0)


class Watched:
    """An engine under a watchdog, and the work that its processes do in each second."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.work = Work(0.0, 0)
        self.measured = 0
        self._watchdog = Watchdog(SETTINGS, self._work_done, self.clock)
        self._watchdog.hangs(None)

    def _work_done(self) -> Work:
        self.measured += 1
        return self.work

    def goes_on(self, doing: Doing | None, seconds: float, share: float = 0.0, moved: int = 0) -> str:
        """It does the same for so long, working so much; returns what the watchdog says first."""
        for _ in range(int(seconds * 4)):
            self.clock.advance(0.25)
            self.work = Work(self.work.seconds + share / 4, self.work.moved + moved // 4)
            if said := self._watchdog.hangs(doing):
                return said
        return ""


@pytest.mark.parametrize("doing", [CALL, LOAD], ids=["call", "load"])
def test_what_makes_no_progress_and_does_nothing_hangs(doing: Doing) -> None:
    """After the time for it, and no earlier; heartbeats and renewals are no work."""
    watched = Watched()

    assert watched.goes_on(doing, 95, share=0.004) == ""
    assert watched.goes_on(doing, 20, share=0.004).startswith("no progress for 1")


@pytest.mark.parametrize(("share", "moved"), [(0.05, 0), (0.0, 200_000)], ids=["computes", "reads"])
def test_a_load_that_works_never_hangs(share: float, moved: int) -> None:
    """Reading, fetching, converting, compiling: for hours."""
    assert Watched().goes_on(LOAD, 20_000, share=share, moved=moved) == ""


def test_a_call_that_computes_hangs_after_very_long() -> None:
    """A long prefill and a compilation compute, and so does a loop without an end."""
    watched = Watched()

    assert watched.goes_on(CALL, 990, share=1.0) == ""
    assert watched.goes_on(CALL, 20, share=1.0).startswith("no token made and no request finished for 1000")


def test_a_call_that_makes_something_now_and_then_never_hangs() -> None:
    """Each token and each finished request is progress, however long the call."""
    watched = Watched()
    for step in range(100):
        assert watched.goes_on(replace(CALL, progress=float(step)), 90) == ""


def test_work_now_and_then_is_work() -> None:
    watched = Watched()
    for _ in range(5):
        assert watched.goes_on(CALL, 80) == ""
        assert watched.goes_on(CALL, 10, share=0.5) == ""


def test_an_engine_that_has_nothing_to_do_does_not_hang_and_costs_nothing() -> None:
    watched = Watched()

    assert watched.goes_on(None, 10_000) == ""
    for step in range(1000):
        watched.goes_on(replace(CALL, progress=float(step)), 0.5)

    assert watched.measured == 0


def test_time_in_which_this_process_stood_still_does_not_count() -> None:
    """It was stopped, or its machine suspended: the engine stood still as well."""
    watched = Watched()
    watched.goes_on(CALL, 20)
    watched.clock.advance(10_000)

    assert watched.goes_on(CALL, 60) == ""
    assert watched.goes_on(CALL, 40) != ""


def test_a_process_that_has_ended_was_at_work() -> None:
    """What it did is not in the sum any longer, which is smaller than before."""
    watched = Watched()
    watched.work = Work(100.0, 10**9)
    watched.goes_on(LOAD, 90)
    watched.work = Work(1.0, 0)

    assert watched.goes_on(LOAD, 90) == ""


def spin(until: threading.Event) -> None:
    while not until.is_set():
        pass


def read(until: threading.Event) -> None:
    while not until.is_set():
        Path(sys.executable).read_bytes()


def test_another_thread_and_another_process_are_seen_at_work() -> None:
    """Whatever this thread does is not the engine's."""
    before, over = work_done(), threading.Event()
    threading.Thread(target=spin, args=[over], daemon=True).start()
    eventually(lambda: work_done().seconds > before.seconds + 0.2, 30, what="the thread's work")
    over.set()

    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        before = work_done()
        eventually(lambda: work_done().seconds > before.seconds + 0.2, 30, what="the process' work")
        process.kill()


def test_what_is_read_is_seen() -> None:
    before, over = work_done(), threading.Event()
    threading.Thread(target=read, args=[over], daemon=True).start()

    eventually(lambda: work_done().moved > before.moved + 10**6, 30, what="the bytes")
    over.set()
