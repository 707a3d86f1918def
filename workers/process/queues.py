"""The queues that a worker consumes: those of its command line, and those that are added while it runs."""

from __future__ import annotations

import difflib
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial

from shared.contract import EngineName
from shared.errors import ConfigurationError, FleetError, NoDeviceAvailable
from workers.devices.devices import Devices
from workers.models.manager import ModelManager
from workers.path.execution import Loop
from workers.path.intake import IntakeContext
from workers.process.roster import Roster

logger = logging.getLogger(__name__)


def check_names(names: Iterable[str], known: Iterable[str]) -> None:
    """Raise :class:`ConfigurationError` for a queue that does not exist, with the name of the nearest."""
    known = sorted(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigurationError(f"there is no queue {name!r}{meant} (there are: {', '.join(known)})")


class LateEngines:
    """Engines whose queues are added while the worker runs: what imports their libraries is not the loop."""

    def __init__(self, roster: Roster, devices: Devices) -> None:
        self._roster = roster
        self._devices = devices
        self._arrived: deque[tuple[ModelManager, Callable[[], None]]] = deque()

    def take_on(self, name: EngineName, then: Callable[[], None]) -> None:
        """Have an engine, and call ``then`` on the loop when its queue may be consumed: it claims when it has loaded.

        Raises what :meth:`Roster.check` does, and :class:`NoDeviceAvailable` where it needs GPUs that this worker has
        not leased.
        """
        if name.value in self._roster.intakes:
            then()
            return
        self._roster.check(name)
        if lack := self._devices.lack_of(name):
            raise NoDeviceAvailable(lack)
        if not self._roster.expected(name):
            self._roster.expects([name])
            threading.Thread(target=partial(self._prepare, name, then), name=f"prepare-{name}", daemon=True).start()

    def _prepare(self, name: EngineName, then: Callable[[], None]) -> None:
        try:
            models = self._roster.models_of(name)
        except Exception as error:  # the boundary: whatever importing a library raises
            reason = error.message if isinstance(error, FleetError) else f"{type(error).__name__}: {error}"
            logger.exception("the %s engine cannot be taken on: %s", name, reason)
            self._roster.without(name, f"the {name} engine cannot run here: {reason}")
        else:
            self._arrived.append((models, then))

    def arrive(self, context: IntakeContext, loop: Loop) -> None:
        """Take those in that are there now. Called often, on the loop."""
        while self._arrived:
            models, then = self._arrived.popleft()
            self._roster.add(models, context).attach(loop)
            logger.info("the %s engine is taken on", models.engine.name)
            then()
