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
from typing import Any

import redis
from celery import Celery
from celery.worker import state

from shared.broker import connect
from shared.contract import EngineName
from shared.errors import ConfigurationError, FleetError, MissingDependency
from shared.registry import EngineInfo, WorkerInfo, WorkerRegistry
from shared.settings import Settings
from shared.signing import Signer
from workers.canvas import Canvas
from workers.delivery import Delivery
from workers.devices.devices import Devices
from workers.engines import engine_class
from workers.events import TaskObserver
from workers.intake import Intake, Services
from workers.leases import LeaseKeeper
from workers.models import ModelManager
from workers.parity import ParityGate
from workers.rescue import Rescuer
from workers.runner import BatchRunner, ContinuousRunner, EngineRunner, Event, Finished
from workers.sweeper import Sweeper
from workers.transport import Services as TransportServices

logger = logging.getLogger(__name__)

FRESH_SECONDS = 0.1
"""How old the list of live workers may be where a decision wants it fresh."""


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

    def transport_options(self) -> dict[str, Any]:
        """What the transport needs of us, and time limits on its connections."""
        fleet = self.settings.fleet
        return {
            "services": TransportServices(
                self.delivery, self.leases, self.intakes, Signer(fleet.signing_key), fleet.max_payload_bytes
            ),
            "socket_timeout": fleet.socket_timeout_seconds,
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
        self.devices.take(engines, check=state.maybe_shutdown)
        self.observer = TaskObserver(app)
        services = Services(
            self.settings, self.delivery, self.leases, self.observer, Canvas(app), self.worker_id, self.live_workers,
            self.refresh, self.announce_now, self.tend,
        )  # fmt: skip
        for name in engines:
            self._add(name, services)
        preload = self.settings.monitoring.server.preload_models
        for runner in self._runners:
            runner.start([model for model in preload if runner.models.declares(model)])
        for runner in self._runners:
            runner.loaded.wait()
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

    def _add(self, name: EngineName, services: Services) -> None:
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

    def refresh(self) -> None:
        """Ask who lives now, unless that was asked just before: many requests may want to know at once."""
        now = time.monotonic()
        if now - self._live_at >= FRESH_SECONDS:
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

    def _announce_forever(self) -> None:
        while not self._stop.is_set():
            self._news.clear()
            try:
                self.registry.announce(self.describe())
                self.refresh()
                self.delivery.share_out(sum(info.max_batch_size for w in self._live for info in w.engines))
                self.rescuer.look(time.monotonic())
            except (redis.RedisError, OSError) as error:
                logger.warning("cannot announce this worker: %s", error)
            self._news.wait(self.settings.fleet.heartbeat_seconds)

    def tend(self) -> None:
        """Show that the loop lives, and drop what other workers have taken over. Called by the loop, often."""
        lost = self.leases.tend()
        if lost:
            for intake in self.intakes.values():
                intake.forget(lost)

    # -- stop -------------------------------------------------------------------------------------------------------

    def fail(self, reason: str) -> None:
        """Claim no more, drain, and end with status 1 so that a supervisor starts this worker anew. From any thread."""
        logger.critical("this worker stops: %s", reason)
        for intake in self.intakes.values():
            intake.accepting = False
        state.should_stop = 1  # Celery's loop looks at it at least at every sweep

    def leave(self) -> None:
        """Take this worker out of the registry: nothing is routed to it any longer."""
        self._stop.set()
        self._news.set()
        if self._heartbeat is not None:
            self._heartbeat.join(timeout=5)
            self._heartbeat = None
        try:
            self.registry.leave(self.worker_id)
        except (redis.RedisError, OSError) as error:
            logger.warning("cannot leave the registry: %s", error)

    def drain(self) -> None:
        """Give back what waits, let what runs end within the configured grace, and write its outcomes."""
        deadline = time.monotonic() + self.settings.monitoring.server.graceful_shutdown_timeout
        try:
            for intake in self.intakes.values():
                intake.give_back()
            for intake in self.intakes.values():
                intake.finish(deadline)
        except (redis.RedisError, FleetError, OSError) as error:
            logger.error(
                "the broker is gone while this worker stops; its requests come back with their leases: %s", error
            )

    def close(self) -> None:
        """Let leases go that are still held, unload the models and stop the threads."""
        self.leases.close()
        idle = True
        for runner in self._runners:
            if not runner.stop(timeout=5):
                idle = False
                logger.warning("the %s engine is still busy; leaving it", runner.models.engine.name)
        if idle:  # else the GPUs are in use up to the very end, and are released there
            self.devices.release()
        self.client.close()
