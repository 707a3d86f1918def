"""The composition root of a worker process: what it is made of, and how that is wired. Nothing is decided here."""

from __future__ import annotations

import gc
import logging
import os
import platform
import time
import uuid
from collections.abc import Iterable, Sequence

import redis
from celery import Celery
from celery.worker import state

from shared.broker import connect
from shared.contract import EngineName
from shared.errors import ConfigurationError, MissingDependency
from shared.limits import Limits, LimitsInForce
from shared.registry import EngineInfo, ServedModel, WorkerInfo, WorkerRegistry
from shared.settings import ModelSpec, Settings
from shared.signing import Signer
from workers.broker.delivery import RedisDelivery
from workers.broker.lease_ids import LeaseTokens
from workers.broker.leases import LeaseKeeper
from workers.devices.devices import Devices
from workers.ends.canvas import Canvas
from workers.ends.settler import Settler
from workers.engines import engine_class
from workers.models.manager import ModelEvent, ModelManager
from workers.models.parity import ParityGate
from workers.observe.celery_events import CeleryEvents
from workers.observe.observers import Observers
from workers.path.intake import Intake, IntakeContext
from workers.path.runner import BatchRunner, ContinuousRunner, EngineRunner, Event, Finished
from workers.process.announcing import Announcer, LiveWorkers
from workers.process.stopping import Stopping
from workers.routing.doubts import Doubts
from workers.routing.rescuer import Rescuer
from workers.routing.sweeper import Sweeper

logger = logging.getLogger(__name__)

LOAD_POLL_SECONDS = 0.1
"""How often a worker that loads its models looks whether it is to stop."""


class Fleet:
    """Everything of this process that outlives a broker connection."""

    def __init__(self, settings: Settings, app: Celery) -> None:
        self.settings = settings
        self.worker_id = f"{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self.client: redis.Redis = connect(settings.fleet)
        self.limits = LimitsInForce(Limits.of(settings))
        tokens = LeaseTokens()
        self.delivery = RedisDelivery(self.client, settings.fleet, self.limits, self.worker_id, tokens)
        self.leases = LeaseKeeper(settings.fleet, tokens.process)
        self.registry = WorkerRegistry(self.client, settings.fleet.silent_after_seconds)
        self.devices = Devices(settings, self.client, self.worker_id)
        self.signer = Signer(settings.fleet.signing_key)
        self.events = CeleryEvents(app)
        self.observers = Observers([self.events])
        self.settler = Settler(self.delivery, self.leases, self.observers, Canvas(app, self.signer))
        self.sweeper = Sweeper(self.delivery, self.settler, self.limits)
        self.doubts = Doubts(self.client, self.worker_id)
        self.live = LiveWorkers(self.registry)
        self.rescuer = Rescuer(self.delivery, self.settler, self.limits, settings, self.worker_id, self.live)
        self.announcer = Announcer(
            self.client, settings.fleet, self.registry, self.live, self.delivery, self.describe, self.rescuer.look
        )
        self.intakes: dict[str, Intake] = {}
        self._runners: list[EngineRunner] = []
        self.stopping = Stopping(
            self.client, self.delivery, self.leases, self.devices, self.observers, self.announcer,
            self.intakes.values(), self._runners, self.tend,
        )  # fmt: skip
        self._app = app
        self._absent: dict[EngineName, str] = {}
        self._coming: list[EngineName] = []
        self._ready = False
        self._queues: tuple[str, ...] = ()
        self._started = time.time()

    # -- start ------------------------------------------------------------------------------------------------------

    def serve(self, queues: Iterable[str]) -> None:
        """Load the engines that the queues name, and the models that are to be preloaded.

        The fleet knows of it meanwhile, so that what waits on these queues waits for it.

        An engine whose library is not here is announced as such, and its queue left to others.

        Raises :class:`ConfigurationError` for an engine that is switched off, :class:`MissingDependency` where none of
        them can run here, :class:`NoDeviceAvailable` where the GPUs that they need are not to be had.
        """
        named = [EngineName(queue) for queue in queues if queue in set(EngineName)]
        engines = self._installed(named)
        consumed = self._app.amqp.queues
        if absent := [name.value for name in named if name not in engines]:
            consumed.deselect(absent)
        self._queues = tuple(consumed.consume_from)
        self.leases.start()
        self.devices.acquire(engines, check=state.maybe_shutdown)
        context = IntakeContext(
            self.settings, self.limits, self.delivery, self.leases, self.observers, self.settler, self.worker_id,
            self.live, self.live.refresh, self.announcer.announce_now, state.revoked, time.time,
        )  # fmt: skip
        self._coming = list(engines)
        self.announcer.start()
        for name in engines:
            self._add(name, context)
        self._coming.clear()
        preload = self.settings.monitoring.server.preload_models
        for runner in self._runners:
            runner.start([model for model in preload if runner.models.declares(model)])
        for runner in self._runners:
            while not runner.loaded.wait(LOAD_POLL_SECONDS):
                state.maybe_shutdown()
        self.devices.start(self.fail)
        self.observers.post("gpus_changed", self.devices.gpus, self.devices.problems)
        self.leases.wait()
        # What is loaded by now stays. Each full collection would look at all of it again, and hold every thread up for
        # as long as that takes.
        gc.collect()
        gc.freeze()

    def consuming(self) -> None:
        """The loop has begun to take requests: say so."""
        if not self._ready:
            self._ready = True
            self.announcer.announce_now()

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

    def _add(self, name: EngineName, context: IntakeContext) -> None:
        gate = ParityGate(name, self.settings, self.client)
        models = ModelManager(engine_class(name)(self.settings), self.settings, self.limits, gate)

        def report(event: Event) -> None:
            if isinstance(event, Finished):
                self.devices.saw(event.outcome)
            self.intakes[name.value].report(event)

        def changed(event: ModelEvent) -> None:
            self.observers.post("model_changed", name, event)

        models.on_event = changed
        kind = BatchRunner if models.engine.slots is None else ContinuousRunner
        runner = kind(models, report, lambda: self.observers.listens("tokens_made"))
        self.intakes[name.value] = Intake(name.value, runner, context)
        self._runners.append(runner)

    # -- while it runs ----------------------------------------------------------------------------------------------

    def describe(self) -> WorkerInfo:
        """What this worker announces."""
        limits = self.limits.now
        batch = limits.batcher.max_batch_size if limits.batcher.enabled else 1
        engines = tuple(
            EngineInfo(
                name=runner.models.engine.name,
                features=tuple(sorted(runner.models.engine.features)),
                models=runner.models.status(),
                max_batch_size=runner.models.engine.slots or batch,
                failed={name: str(error)[:500] for name, error in runner.models.failures().items()},
            )
            for runner in list(self._runners)
        )
        known = {info.name for info in engines}
        engines += tuple(
            EngineInfo(
                name=name,
                features=tuple(sorted(engine_class(name).features)),
                models={model: ServedModel(kinds=spec.kinds) for model, spec in self._declared(name).items()},
            )
            for name in self._coming
            if name not in known
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
            in_flight=sum(intake.in_flight for intake in list(self.intakes.values())),
            limits=limits,
            quiet_seconds={
                runner.models.engine.name: seconds
                for runner in self._runners
                if (seconds := runner.progress.quiet_seconds()) is not None
            },
            ready=self._ready,
            loading={
                runner.models.engine.name: model
                for runner in self._runners
                if (model := runner.models.loading) is not None
            },
            gpus=self.devices.gpus,
            gpu_problems=self.devices.problems,
        )

    def _declared(self, engine: EngineName) -> dict[str, ModelSpec]:
        return {name: spec for name, spec in self.settings.models.catalog.items() if spec.served_by(engine)}

    def tend(self) -> None:
        """Show that the loop lives; end what other workers have taken over and what nobody wants. Called often."""
        lost = self.leases.tend(self.delivery.wait)
        self.delivery.give_back_lost()
        for intake in self.intakes.values():
            if lost:
                intake.forget(lost)
            intake.tend()
        self.observers.deliver()

    # -- stop -------------------------------------------------------------------------------------------------------

    @property
    def grace(self) -> float:
        """Seconds that a stopping worker may take to finish what runs."""
        return self.settings.monitoring.server.graceful_shutdown_timeout

    def fail(self, reason: str) -> None:
        """Claim no more, drain, and end with status 1 so that a supervisor starts this worker anew. From any thread."""
        logger.critical("this worker stops: %s", reason)
        self.observers.post("gpus_changed", self.devices.gpus, self.devices.problems)
        for intake in self.intakes.values():
            intake.accepting = False
        state.should_stop = 1  # Celery's loop looks at it at least at every sweep
