"""A worker's heartbeat: it announces itself, learns who else lives, and looks after queues that nobody serves."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import redis

from shared.broker_checks import SKEW_REMEDY, check_eviction, check_persistence, check_version, skewed
from shared.clock import SKEW_SECONDS, BrokerClock
from shared.errors import FleetError
from shared.findings import Grade
from shared.masking import masked_url
from shared.registry import Roster, WorkerInfo, WorkerRegistry
from shared.settings import FleetSettings
from workers.broker.delivery import Delivery

logger = logging.getLogger(__name__)

FRESH_SECONDS = 0.1
"""How old the list of live workers may be where a decision wants it fresh."""


class LiveWorkers:
    """The workers of the fleet, as of the last time the registry was asked. From any thread.

    ``clock`` tells seconds since the epoch.
    """

    def __init__(self, registry: WorkerRegistry, clock: Callable[[], float] = time.time) -> None:
        self._roster = Roster(registry)
        self._clock = clock
        self._at = float("-inf")
        self.known: list[WorkerInfo] = []

    def __call__(self) -> list[WorkerInfo]:
        """Those that were known last."""
        return self.known

    def announce(self, worker: WorkerInfo) -> None:
        """Say that ``worker`` lives, and learn who else does."""
        now = self._clock()
        self.known = self._roster.announce(worker)
        self._at = now

    def refresh(self, since: float) -> None:
        """Ask who lives now, unless that was asked just before, and after ``since`` (seconds since the epoch).

        Many requests may want to know at once.
        """
        now = self._clock()
        if not max(since, now - FRESH_SECONDS) <= self._at <= now:
            self.known = self._roster.read()
            self._at = now


class Announcer:
    """The thread that does it.

    ``describe`` says what this worker announces; ``look`` is called after each time, once it takes requests.
    """

    def __init__(
        self,
        client: redis.Redis,
        fleet: FleetSettings,
        registry: WorkerRegistry,
        live: LiveWorkers,
        delivery: Delivery,
        describe: Callable[[], WorkerInfo],
        look: Callable[[float], object],
        clock: BrokerClock,
    ) -> None:
        self._clock = clock
        self._skew = 0.0
        self._client = client
        self._fleet = fleet
        self._registry = registry
        self._live = live
        self._delivery = delivery
        self._describe = describe
        self._look = look
        self._stop = threading.Event()
        self._news = threading.Event()
        self._thread: threading.Thread | None = None
        self._checked = False

    def start(self) -> None:
        """Announce this worker now, and from now on at every heartbeat."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
            self._thread.start()

    def announce_now(self) -> None:
        """Something about this worker has changed: do not wait for the next heartbeat."""
        self._news.set()

    def leave(self) -> None:
        """Take this worker out of the registry, and end; does not wait for it."""
        self._stop.set()
        self._news.set()

    def join(self, seconds: float) -> None:
        """Wait for the end of the thread, but not longer than this."""
        if self._thread is not None:
            self._thread.join(timeout=seconds)

    def _run(self) -> None:
        worker_id = ""
        while not self._stop.is_set():
            self._news.clear()
            try:
                info = self._describe()
                worker_id = info.id
                self._live.announce(info)
                self._check_broker()
                self._check_clock()
                self._delivery.share_out(sum(engine.max_batch_size for w in self._live() for engine in w.engines))
                if info.ready:
                    self._look(time.monotonic())
            except (redis.RedisError, FleetError, OSError) as error:
                logger.warning("cannot announce this worker: %s", error)
            self._news.wait(self._fleet.heartbeat_seconds)
        try:
            self._registry.leave(worker_id)
        except (redis.RedisError, OSError) as error:
            logger.warning("cannot leave the registry: %s", error)

    def _check_clock(self) -> None:
        """Say once that this machine's clock is wrong, and when it is right again."""
        skew = self._clock.ahead or 0.0
        if abs(skew - self._skew) <= SKEW_SECONDS:
            return
        self._skew = skew if abs(skew) > SKEW_SECONDS else 0.0
        if self._skew:
            logger.warning("%s; deadlines and delays go by the broker's. Remedy: %s", skewed(skew), SKEW_REMEDY)
        else:
            logger.warning("this machine's clock agrees with the broker's again")

    def _check_broker(self) -> None:
        """Say once what of the broker's settings would lose requests."""
        if self._checked:
            return
        try:
            info = self._client.info()
        except redis.exceptions.NoPermissionError:
            info = None
        self._checked = True
        if not isinstance(info, dict):
            return
        url = masked_url(self._fleet.redis_url)
        for found in (check_version(info, url), check_persistence(info), check_eviction(info)):
            if found.grade is not Grade.OK:
                logger.warning("broker %s: %s: %s. Remedy: %s", url, found.subject, found.detail, found.remedy)
