"""Whether an engine hangs in what it was given: judged by the progress that it makes, and by the work that is done.

An engine makes progress when it makes tokens, finishes a request, or has loaded. Between two such steps much may have
to be computed, copied, converted or compiled, which only shows as work of the worker's processes. So what makes no
progress and does no work hangs; what makes none for very much longer hangs too, though something computes: unless it
loads, for a conversion may take hours. Pure: the clock, and what measures the work, are passed in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from shared.settings import WatchdogSettings
from workers.process.activity import Work

LONGEST_GAP = 1.0
"""Seconds between two looks that count: what is longer was this process' own standing still, or its machine's."""

WORKS_SHARE = 0.01
"""Share of a processor above which the processes work. Heartbeats and renewals take a fifth of it."""

WORKS_BYTES = 65536
"""Bytes a second above which they work: a model that is read, or fetched over a slow line."""

MEASURES = 20
"""How often the work is measured in the time after which an idle engine hangs; not more often than once a second."""


@dataclass(frozen=True, slots=True)
class Doing:
    """What an engine does. ``progress`` differs from what it was whenever a step was made."""

    loading: str | None
    progress: float


class Watchdog:
    """Watches one engine. To be asked several times a second; it measures nothing while there is progress."""

    def __init__(self, settings: WatchdogSettings, work_done: Callable[[], Work], clock: Callable[[], float]) -> None:
        self._settings = settings
        self._work_done = work_done
        self._clock = clock
        self._every = max(1.0, settings.idle_seconds / MEASURES)
        self._doing: Doing | None = None
        self._looked = 0.0
        self._start(None)

    def _start(self, doing: Doing | None) -> None:
        self._doing = doing
        self._quiet = self._idle = self._span = 0.0
        self._work: Work | None = None

    def hangs(self, doing: Doing | None) -> str:
        """Why what the engine does (``None``: nothing) is taken to hang; empty where it is not."""
        now = self._clock()
        gap, self._looked = min(now - self._looked, LONGEST_GAP), now
        if doing is None or doing != self._doing:
            self._start(doing)
            return ""
        self._quiet += gap
        self._span += gap
        if self._span >= self._every:
            self._measure()
        if self._idle >= self._settings.idle_seconds:
            return f"no progress for {self._quiet:.0f} s, and the worker's processes do nothing"
        if self._quiet >= self._settings.busy_seconds and not doing.loading:
            return f"no token made and no request finished for {self._quiet:.0f} s"
        return ""

    def _measure(self) -> None:
        """Whether anything was done since the last time."""
        work, span, self._span = self._work_done(), self._span, 0.0
        before, self._work = self._work, work
        if before is None:  # what was done before this is not known
            return
        seconds, moved = work.seconds - before.seconds, work.moved - before.moved
        ended = seconds < 0 or moved < 0  # a process has: what it did is not counted any longer
        works = ended or seconds >= WORKS_SHARE * span or moved >= WORKS_BYTES * span
        self._idle = 0.0 if works else self._idle + span
