"""The composition root of a worker process: builds what it is made of, starts it, and stops it in order."""

from __future__ import annotations

import gc
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import redis
from celery import Celery
from celery.worker import state

from shared.broker import connect, hasten
from shared.broker_checks import check_eviction, check_persistence, check_version
from shared.contract import EngineName
from shared.errors import ConfigurationError, FleetError, MissingDependency
from shared.findings import Grade
from shared.masking import masked_url
from shared.registry import EngineInfo, WorkerInfo, WorkerRegistry
from shared.settings import Settings
from shared.signing import Signer
from workers.broker.delivery import Delivery
from workers.broker.leases import LeaseKeeper
from workers.devices.devices import Devices
from workers.ends.canvas import Canvas
from workers.ends.outbox import BROKER_ERRORS
from workers.engines import engine_class
from workers.hooks.transport import TransportParts
from workers.models.manager import ModelManager
from workers.models.parity import ParityGate
from workers.observe.celery_events import TaskObserver
from workers.path.intake import Intake, IntakeContext
from workers.path.runner import BatchRunner, ContinuousRunner, EngineRunner, Event, Finished
from workers.routing.rescuer import Rescuer
from workers.routing.sweeper import Sweeper

logger = logging.getLogger(__name__)

TEND_SECONDS = 0.25
"""How often what runs is looked at for requests that were cancelled or have expired."""

FRESH_SECONDS = 0.1
"""How old the list of live workers may be where a decision wants it fresh."""

LOAD_POLL_SECONDS = 0.1
"""How often a worker that loads its models looks whether it is to stop."""

BUSY_POLL_SECONDS, AWAY_POLL_SECONDS = 0.005, 0.2
"""How often a stopping worker looks for outcomes; and tries a broker that is away."""

EVENT_TIMEOUT_SECONDS = 2.0
"""Longest wait of the worker's loop for what Celery sends: events and replies of remote control. Not for requests."""

STOP_TIMEOUT_SECONDS = 2.0
"""Longest wait for the broker's answer while stopping."""

UNLOAD_SECONDS, BUSY_SECONDS = 5.0, 1.0
"""How long engines may take to unload; and where one has not come back from what it runs or loads."""


class Fleet:
    """Everything of this process that outlives a broker connection."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.worker_id = f"{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self.client: redis.Redis = connect(settings.fleet)
        self.delivery = Delivery(self.client, settings.fleet)
        self.leases = LeaseKeeper(settings.fleet)
        self.registry = WorkerRegistry(self.client, settings.fleet.silent_after_seconds)
        self.devices = Devices(settings, self.client, self.worker_id)
        self.sweeper = Sweeper(self.delivery, settings.fleet.max_deliveries)
        self.rescuer = Rescuer(self.delivery, settings, self.worker_id, self.live_workers)
        self.intakes: dict[str, Intake] = {}
        self.observer: TaskObserver | None = None
        self._absent: dict[EngineName, str] = {}
        self._runners: list[EngineRunner] = []
        self._queues: tuple[str, ...] = ()
        self._started = time.time()
        self._live: list[WorkerInfo] = []
        self._live_at = float("-inf")
        self._stop = threading.Event()
        self._news = threading.Event()
        self._heartbeat: threading.Thread | None = None
        self._checked = False
        self._deadline = float("inf")
        self.heard = self.idle = True

    def transport_options(self) -> dict[str, Any]:
        """What the transport needs of us, and time limits on its connections."""
        fleet = self.settings.fleet
        return {
            "services": TransportParts(
                self.delivery, self.leases, self.intakes, Signer(fleet.signing_key), fleet.max_payload_bytes
            ),
            "socket_timeout": min(fleet.socket_timeout_seconds, EVENT_TIMEOUT_SECONDS),
            "socket_connect_timeout": fleet.connect_timeout_seconds,
            "socket_keepalive": True,
            "health_check_interval": 5,
        }

    # -- start ------------------------------------------------------------------------------------------------------

    def serve(self, app: Celery, queues: Iterable[str]) -> None:
        """Load the engines that the queues name, and the models that are to be preloaded.

        An engine whose library is not here is announced as such, and its queue left to others.

        Raises :class:`ConfigurationError` for an engine that is switched off, :class:`MissingDependency` where none of
        them can run here, :class:`NoDeviceAvailable` where the GPUs that they need are not to be had.
        """
        named = [EngineName(queue) for queue in queues if queue in set(EngineName)]
        engines = self._installed(named)
        if absent := [name.value for name in named if name not in engines]:
            app.amqp.queues.deselect(absent)
        self._queues = tuple(app.amqp.queues.consume_from)
        self.leases.start()
        self.devices.acquire(engines, check=state.maybe_shutdown)
        self.observer = TaskObserver(app)
        services = IntakeContext(
            self.settings, self.delivery, self.leases, self.observer, Canvas(app), self.worker_id, self.live_workers,
            self.refresh, self.announce_now,
        )  # fmt: skip
        for name in engines:
            self._add(name, services)
        preload = self.settings.monitoring.server.preload_models
        for runner in self._runners:
            runner.start([model for model in preload if runner.models.declares(model)])
        for runner in self._runners:
            while not runner.loaded.wait(LOAD_POLL_SECONDS):
                state.maybe_shutdown()
        self.devices.start(self.fail)
        self.leases.wait()
        # What is loaded by now stays. Each full collection would look at all of it again, and hold every thread up for
        # as long as that takes.
        gc.collect()
        gc.freeze()

    def _installed(self, engines: Sequence[EngineName]) -> list[EngineName]:
        """Those of the engines whose libraries are here."""
        found = []
        for name in engines:
            if not self.settings.optimization.engine_enabled(name):
                raise ConfigurationError(f"the {name} engine is switched off (optimization.{name}.enabled)")
            availability = engine_class(name).availability(self.settings)
            if availability.ok:
                found.append(name)
            else:
                self._absent[name] = f"the {name} engine cannot run here: {availability.reason}. {availability.remedy}"
        if engines and not found:
            raise MissingDependency("; ".join(self._absent.values()))
        for reason in self._absent.values():
            logger.error("%s; the other engines serve", reason)
        return found

    def _add(self, name: EngineName, services: IntakeContext) -> None:
        gate = ParityGate(name, self.settings, self.client)
        models = ModelManager(engine_class(name)(self.settings), self.settings, gate)

        def report(event: Event) -> None:
            if isinstance(event, Finished):
                self.devices.saw(event.outcome)
            self.intakes[name.value].report(event)

        kind = BatchRunner if models.engine.slots is None else ContinuousRunner
        runner = kind(models, report)
        self.intakes[name.value] = Intake(name.value, runner, services)
        self._runners.append(runner)

    # -- registry ---------------------------------------------------------------------------------------------------

    def live_workers(self) -> list[WorkerInfo]:
        """The workers of the fleet as of the last heartbeat."""
        return self._live

    def refresh(self, since: float) -> None:
        """Ask who lives now, unless that was asked just before, and after ``since`` (seconds since the epoch).

        Many requests may want to know at once.
        """
        now = time.time()
        if not max(since, now - FRESH_SECONDS) <= self._live_at <= now:
            self._live = self.registry.live()
            self._live_at = now

    def describe(self) -> WorkerInfo:
        """What this worker announces."""
        batcher = self.settings.optimization.batcher
        engines = tuple(
            EngineInfo(
                name=runner.models.engine.name,
                features=tuple(sorted(runner.models.engine.features)),
                models=runner.models.status(),
                max_batch_size=runner.models.engine.slots or (batcher.max_batch_size if batcher.enabled else 1),
                failed={name: str(error)[:500] for name, error in runner.models.failures().items()},
            )
            for runner in self._runners
        )
        engines += tuple(
            EngineInfo(name=name, failed=dict.fromkeys(self._declared(name), reason))
            for name, reason in self._absent.items()
        )
        return WorkerInfo(
            id=self.worker_id,
            host=platform.node(),
            pid=os.getpid(),
            started=self._started,
            queues=self._queues,
            engines=engines,
            in_flight=sum(intake.in_flight for intake in self.intakes.values()),
            gpus=self.devices.gpus,
            gpu_problems=self.devices.problems,
        )

    def _declared(self, engine: EngineName) -> list[str]:
        return [name for name, spec in self.settings.models.catalog.items() if spec.served_by(engine)]

    def announce(self) -> None:
        """Announce this worker now, and from now on at every heartbeat."""
        if self._heartbeat is None:
            self._heartbeat = threading.Thread(target=self._announce_forever, name="heartbeat", daemon=True)
            self._heartbeat.start()

    def announce_now(self) -> None:
        """Something about this worker has changed: do not wait for the next heartbeat."""
        self._news.set()

    def _check_broker(self) -> None:
        """Say once what of the broker's settings would lose requests."""
        if self._checked:
            return
        try:
            info: Any = self.client.info()
        except redis.exceptions.NoPermissionError:
            info = None
        self._checked = True
        if info is None:
            return
        url = masked_url(self.settings.fleet.redis_url)
        for found in (check_version(info, url), check_persistence(info), check_eviction(info)):
            if found.grade is not Grade.OK:
                logger.warning("broker %s: %s: %s. Remedy: %s", url, found.subject, found.detail, found.remedy)

    def _announce_forever(self) -> None:
        while not self._stop.is_set():
            self._news.clear()
            try:
                self.registry.announce(self.describe())
                self._check_broker()
                self.refresh(time.time())
                self.delivery.share_out(sum(info.max_batch_size for w in self._live for info in w.engines))
                self.rescuer.look(time.monotonic())
            except (redis.RedisError, FleetError, OSError) as error:
                logger.warning("cannot announce this worker: %s", error)
            self._news.wait(self.settings.fleet.heartbeat_seconds)
        try:
            self.registry.leave(self.worker_id)
        except (redis.RedisError, OSError) as error:
            logger.warning("cannot leave the registry: %s", error)

    def tend(self) -> None:
        """Show that the loop lives; end what other workers have taken over and what nobody wants. Called often."""
        lost = self.leases.tend(self.delivery.scripts.wait)
        for intake in self.intakes.values():
            if lost:
                intake.forget(lost)
            intake.tend()

    # -- stop -------------------------------------------------------------------------------------------------------

    def fail(self, reason: str) -> None:
        """Claim no more, drain, and end with status 1 so that a supervisor starts this worker anew. From any thread."""
        logger.critical("this worker stops: %s", reason)
        for intake in self.intakes.values():
            intake.accepting = False
        state.should_stop = 1  # Celery's loop looks at it at least at every sweep

    @property
    def grace(self) -> float:
        """Seconds that a stopping worker may take to finish what runs."""
        return self.settings.monitoring.server.graceful_shutdown_timeout

    def stop_within(self, seconds: float) -> float:
        """Have :meth:`stop` end what runs by then, or by the time it was given before where that is earlier.

        Returns the seconds that are left. Fit for a signal handler.
        """
        now = time.monotonic()
        self._deadline = min(self._deadline, now + seconds)
        return max(0.0, self._deadline - now)

    def stop(self) -> None:
        """Leave the registry, give back what waits, let what runs end in time, write its outcomes, unload.

        Afterwards ``heard`` says whether the broker answered to the last, and ``idle`` whether the engines are through.
        """
        if self._stop.is_set():
            return
        hasten(self.client, STOP_TIMEOUT_SECONDS)
        self._stop.set()  # the heartbeat's thread takes this worker out of the registry
        self._news.set()
        with suppress(*BROKER_ERRORS):  # it is told when the outcomes are written again
            self.delivery.scripts.detach()
        self.heard = self._drain()
        busy = any(i.busy for i in self.intakes.values()) or not all(r.loaded.is_set() for r in self._runners)
        self.idle = self._unload(time.monotonic() + (BUSY_SECONDS if busy else UNLOAD_SECONDS))
        if self._heartbeat is not None:
            self._heartbeat.join(timeout=STOP_TIMEOUT_SECONDS)
        self.leases.close()
        self.client.close()

    def _drain(self) -> bool:
        """Wind the intakes up, waiting for a broker that is away; whether it has heard everything in the end."""
        failed = False
        tended = time.monotonic()
        while True:
            now = time.monotonic()
            late = now >= self._deadline
            try:
                through = [intake.wind_up(hurry=late) for intake in self.intakes.values()]
                if now - tended >= TEND_SECONDS:
                    tended = now
                    self.tend()
                if late or all(through):
                    self.client.ping()
                    if self.observer is not None:
                        self.observer.flush()
                    return True
            except BROKER_ERRORS as error:
                if not failed:
                    logger.warning("the broker is away while this worker stops: %s", error)
                failed = True
                if time.monotonic() >= self._deadline or not any(i.in_flight for i in self.intakes.values()):
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
            self.devices.release()
        return not busy
