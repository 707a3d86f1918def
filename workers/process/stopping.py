"""How a worker stops: it leaves the registry, gives back what waits, lets what runs end in time, writes, unloads."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress

import redis

from shared.broker import hasten
from workers.broker.delivery import Delivery
from workers.broker.errors import BROKER_ERRORS
from workers.broker.leases import LeaseKeeper
from workers.devices.devices import Devices
from workers.observe.observers import Observers
from workers.path.intake import Intake
from workers.path.runner import EngineRunner
from workers.process.announcing import Announcer

logger = logging.getLogger(__name__)

TEND_SECONDS = 0.25
"""How often a stopping worker tends what still runs."""

BUSY_POLL_SECONDS, AWAY_POLL_SECONDS = 0.005, 0.2
"""How often a stopping worker looks for outcomes; and tries a broker that is away."""

ANSWER_SECONDS = 2.0
"""Longest wait for the broker's answer while stopping."""

UNLOAD_SECONDS, BUSY_SECONDS = 5.0, 1.0
"""How long engines may take to unload; and where one has not come back from what it runs or loads."""


class Stopping:
    """The one way in which a worker ends.

    Afterwards ``heard`` says whether the broker answered to the last, and ``idle`` whether the engines are through.
    """

    def __init__(
        self,
        client: redis.Redis,
        delivery: Delivery,
        leases: LeaseKeeper,
        devices: Devices,
        observers: Observers,
        announcer: Announcer,
        intakes: Collection[Intake],
        runners: Sequence[EngineRunner],
        tend: Callable[[], None],
    ) -> None:
        self._client = client
        self._delivery = delivery
        self._leases = leases
        self._devices = devices
        self._observers = observers
        self._announcer = announcer
        self._intakes = intakes
        self._runners = runners
        self._tend = tend
        self._deadline = float("inf")
        self._begun = False
        self.heard = self.idle = True

    def within(self, seconds: float) -> float:
        """Have :meth:`run` end what runs by then, or by the time it was given before where that is earlier.

        Returns the seconds that are left. Fit for a signal handler.
        """
        now = time.monotonic()
        self._deadline = min(self._deadline, now + seconds)
        return max(0.0, self._deadline - now)

    def run(self) -> None:
        """Stop. Done once, however often it is called."""
        if self._begun:
            return
        self._begun = True
        hasten(self._client, ANSWER_SECONDS)
        self._announcer.leave()
        with suppress(*BROKER_ERRORS):  # it is told when the ends are written again
            self._delivery.scripts.detach()
        self.heard = self._drain()
        busy = any(i.busy for i in self._intakes) or not all(r.loaded.is_set() for r in self._runners)
        self.idle = self._unload(time.monotonic() + (BUSY_SECONDS if busy else UNLOAD_SECONDS))
        self._announcer.join(ANSWER_SECONDS)
        self._leases.close()
        self._client.close()

    def _drain(self) -> bool:
        """Wind the intakes up, waiting for a broker that is away; whether it has heard everything in the end."""
        failed = False
        tended = time.monotonic()
        while True:
            now = time.monotonic()
            late = now >= self._deadline
            try:
                through = [intake.wind_up(hurry=late) for intake in self._intakes]
                if now - tended >= TEND_SECONDS:
                    tended = now
                    self._tend()
                if late or all(through):
                    self._client.ping()
                    self._observers.deliver()
                    self._observers.tell("flush")
                    return True
            except BROKER_ERRORS as error:
                if not failed:
                    logger.warning("the broker is away while this worker stops: %s", error)
                failed = True
                if time.monotonic() >= self._deadline or not any(i.in_flight for i in self._intakes):
                    logger.error("the broker did not come back; what is open here comes back with its leases")
                    return False
            time.sleep(BUSY_POLL_SECONDS if not failed else AWAY_POLL_SECONDS)

    def _unload(self, deadline: float) -> bool:
        """Unload the models and stop the engines' threads; ``False`` where one is still at work at ``deadline``."""
        for runner in self._runners:
            runner.stop(timeout=0)
        busy = [runner for runner in self._runners if not runner.stop(max(0.0, deadline - time.monotonic()))]
        for runner in busy:
            logger.warning("the %s engine is still busy; leaving it", runner.models.engine.name)
        if not busy:  # else the GPUs are in use up to the very end, and are released there
            self._devices.release()
        return not busy
