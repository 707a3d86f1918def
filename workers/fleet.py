"""The composition root of a worker process: what it is made of, and how that is wired. Nothing is decided here."""

from __future__ import annotations

import gc
import logging
import os
import platform
import time
import uuid
from collections.abc import Callable, Iterable

import redis
from celery import Celery
from celery.worker import state

from shared.broker import connect
from shared.clock import BrokerClock
from shared.contract import EngineName
from shared.limits import Limits, LimitsInForce
from shared.registry import WorkerInfo, WorkerRegistry
from shared.settings import Settings
from shared.signing import Signer
from workers.broker.delivery import RedisDelivery
from workers.broker.lease_ids import LeaseTokens
from workers.broker.leases import LeaseKeeper
from workers.broker.seal import Seal
from workers.devices.devices import Devices
from workers.ends.canvas import Canvas
from workers.ends.settler import Settler
from workers.models.newest import NewestWeights
from workers.observe.celery_events import CeleryEvents
from workers.observe.observers import Observers
from workers.path.execution import Loop
from workers.path.intake import IntakeContext
from workers.path.run_limits import RunLimits
from workers.process.announcing import Announcer, LiveWorkers
from workers.process.guard import Guard
from workers.process.queues import LateEngines
from workers.process.roster import Roster
from workers.process.stopping import Stopping
from workers.requests.inflight import TimeLimits
from workers.routing.doubts import Doubts
from workers.routing.rescuer import Rescuer
from workers.routing.sweeper import Sweeper

logger = logging.getLogger(__name__)

LOAD_POLL_SECONDS = 0.1
"""How often a worker that loads its models looks whether it is to stop."""


COLLECT_AFTER = 10_000
"""Objects made beyond those freed after which Python looks for cycles. A request makes a few hundred that live as long
as it does: with Python's 700, a sixth of a busy worker's time went into looking at them."""


class Fleet:
    """Everything of this process that outlives a broker connection."""

    def __init__(self, settings: Settings, app: Celery) -> None:
        self.settings = settings
        self.worker_id = f"{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self.client: redis.Redis = connect(settings.fleet)
        self.limits = LimitsInForce(Limits.of(settings))
        tokens = LeaseTokens()
        self.clock = BrokerClock()
        self.delivery = RedisDelivery(self.client, settings.fleet, self.limits, self.worker_id, tokens, self.clock)
        self.leases = LeaseKeeper(settings.fleet, tokens.process)
        self.registry = WorkerRegistry(self.client, settings.fleet.silent_after_seconds, self.clock)
        self.devices = Devices(settings, self.client, self.worker_id)
        self.signer = Signer(settings.fleet.signing_key)
        self.events = CeleryEvents(app)
        self.observers = Observers([self.events])
        seal = Seal(self.delivery.secret)
        self.settler = Settler(self.delivery, self.leases, self.observers, Canvas(app, self.signer), seal)
        self.sweeper = Sweeper(self.delivery, self.settler, self.limits, self.clock)
        self.doubts = Doubts(self.client, self.worker_id)
        self.live = LiveWorkers(self.registry, self.clock)
        self.rescuer = Rescuer(
            self.delivery, self.settler, self.limits, settings, self.worker_id, self.live, self.clock
        )
        self.announcer = Announcer(
            self.client,
            settings.fleet,
            self.registry,
            self.live,
            self.delivery,
            self.describe,
            self._look,
            self.clock,
        )
        self._newest = NewestWeights(only=settings.models.newest_only)
        self.roster = Roster(settings, self.limits, self.client, self.devices, self.observers)
        self.intakes = self.roster.intakes
        self.stopping = Stopping(
            self.client, self.delivery, self.leases, self.devices, self.observers, self.announcer,
            self.intakes.values(), self.roster.runners, self.tend,
        )  # fmt: skip
        self._app = app
        self._late = LateEngines(self.roster, self.devices)
        self._context = IntakeContext(
            settings, self.limits, self.delivery, self.leases, self.observers, self.settler, self.worker_id,
            self.live, self.live.refresh, self.announcer.announce_now, state.revoked, self.clock,
            RunLimits(self._time_limits, time.monotonic),
        )  # fmt: skip
        self._guard = Guard(settings.optimization.watchdog, self.roster, self.fail)
        self._loop: Loop | None = None
        self._ready = False
        self._started = time.time()

    def _time_limits(self) -> TimeLimits:
        """The limits of every request that names none: those of the command line, or of remote control."""
        return self.events.task.time_limit, self.events.task.soft_time_limit

    # -- start ------------------------------------------------------------------------------------------------------

    def serve(self, queues: Iterable[str]) -> None:
        """Load the engines that the queues name, and the models that are to be preloaded.

        The fleet knows of it meanwhile, so that what waits on these queues waits for it.

        An engine whose library is not here is announced as such, and its queue left to others.

        Raises :class:`ConfigurationError` for an engine that is switched off, :class:`MissingDependency` where none of
        them can run here, :class:`NoDeviceAvailable` where the GPUs that they need are not to be had.
        """
        named = [EngineName(queue) for queue in queues if queue in set(EngineName)]
        engines = self.roster.installed(named)
        if absent := [name.value for name in named if name not in engines]:
            self._app.amqp.queues.deselect(absent)
        self.leases.start()
        self.devices.acquire(engines, check=state.maybe_shutdown)
        self.roster.expects(engines)
        self.announcer.start()
        for name in engines:
            self.roster.add(self.roster.models_of(name), self._context)
        for runner in self.roster.runners:
            while not runner.loaded.wait(LOAD_POLL_SECONDS):
                self._guard.look()
                state.maybe_shutdown()
        self.devices.start(self.fail)
        self.observers.post("gpus_changed", self.devices.gpus, self.devices.problems)
        self.leases.wait()
        # What is loaded by now stays. Each full collection would look at all of it again, and hold every thread up for
        # as long as that takes.
        gc.collect()
        gc.freeze()
        gc.set_threshold(COLLECT_AFTER, *gc.get_threshold()[1:])

    def attach(self, loop: Loop) -> None:
        """A loop is about to run: settle what was left over, and take requests."""
        self._loop = loop
        self.tend()
        for intake in self.intakes.values():
            intake.attach(loop)

    def consuming(self) -> None:
        """The loop takes requests, and perhaps of other queues than before: say so."""
        self._ready = True
        self.announcer.announce_now()

    # -- while it runs ----------------------------------------------------------------------------------------------

    def describe(self) -> WorkerInfo:
        """What this worker announces."""
        queues = tuple(self._app.amqp.queues.consume_from)
        return WorkerInfo(
            id=self.worker_id,
            host=platform.node(),
            pid=os.getpid(),
            started=self._started,
            queues=queues,
            engines=self.roster.announced(queues),
            in_flight=sum(intake.in_flight for intake in list(self.intakes.values())),
            limits=self.limits.now,
            quiet_seconds={
                runner.models.engine.name: seconds
                for runner in list(self.roster.runners)
                if (seconds := runner.progress.quiet_seconds()) is not None
            },
            ready=self._ready,
            loading={
                runner.models.engine.name: model
                for runner in list(self.roster.runners)
                if (model := runner.models.loading) is not None
            },
            weights={
                runner.models.engine.name: weights
                for runner in list(self.roster.runners)
                if (weights := runner.models.weights())
            },
            gpus=self.devices.gpus,
            gpu_problems=self.devices.problems,
        )

    def _look(self, now: float) -> None:
        """Look after what is known of the other workers; at each heartbeat, not on the loop."""
        if self._newest.compare([runner.models for runner in list(self.roster.runners)], self.live()):
            self.announcer.announce_now()
        self.rescuer.look(now)

    def take_on(self, engine: EngineName, then: Callable[[], None]) -> None:
        """Have another engine while this worker runs; ``then`` is called when its queue may be consumed.

        Raises :class:`FleetError` where it cannot be had here.
        """
        self._late.take_on(engine, then)

    def tend(self) -> None:
        """Show that the loop lives; end what other workers have taken over and what nobody wants. Called often."""
        lost = self.leases.tend(self.delivery.wait)
        self.delivery.give_back_lost()
        for intake in self.intakes.values():
            if lost:
                intake.forget(lost)
            intake.tend()
        self._guard.look()
        if self._loop is not None:
            self._late.arrive(self._context, self._loop)
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
