"""Watches the engines of a worker for one that hangs: then the worker gives back what it has, and ends."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from shared.contract import EngineName
from shared.settings import WatchdogSettings
from workers.path.runner import EngineRunner
from workers.process.activity import work_done
from workers.process.roster import Roster
from workers.process.watchdog import Doing, Watchdog

logger = logging.getLogger(__name__)


class Guard:
    """Looks at all engines; ``fail`` is told once, of the first that hangs.

    What a hanging engine runs stays leased until this worker ends, and is given back then by the process that keeps its
    leases: that counts as a delivery, for the request may be what the engine hangs in.
    """

    def __init__(self, settings: WatchdogSettings, roster: Roster, fail: Callable[[str], None]) -> None:
        self._settings = settings
        self._roster = roster
        self._fail = fail
        self._watchdogs: dict[EngineName, Watchdog] = {}
        self._failed = False

    def look(self) -> None:
        """To be called several times a second."""
        if self._failed or not self._settings.enabled:
            return
        for runner in self._roster.runners:
            name, doing = runner.models.engine.name, _doing(runner)
            watchdog = self._watchdogs.get(name)
            if watchdog is None:
                watchdog = self._watchdogs[name] = Watchdog(self._settings, work_done, time.monotonic)
            if reason := watchdog.hangs(doing):
                self._failed = self._roster.intakes[name.value].hung = True
                logger.error("the %s engine hangs in\n%s", name, runner.frames)
                what = f"with loading {doing.loading!r}" if doing is not None and doing.loading else "in a call"
                self._fail(f"the {name} engine hangs {what}: {reason}; its requests go back, and count as delivered")
                return


def _doing(runner: EngineRunner) -> Doing | None:
    loading, last = runner.models.loading, runner.progress.last
    return None if loading is None and last is None else Doing(loading, last or 0.0)
