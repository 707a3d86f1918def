"""Workers on a broker in memory: real intakes, settlers, sweepers and rescuers, without processes or threads."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import orjson

from shared import keys, wire
from shared.contract import EngineName, InferenceRequest, Kind, Priority
from shared.errors import BadRequest, Cancelled, FleetError
from shared.limits import Limits, LimitsInForce
from shared.registry import EngineInfo, WorkerInfo
from shared.settings import FleetSettings, ModelSpec, ModelsSettings, OptimizationSettings, Settings
from tests.support.clock import ManualClock
from tests.support.loop import ManualLoop
from tests.support.scripted import ScriptedRunner, scripted_models
from workers.broker.delivery import Claim, Settlement
from workers.broker.errors import BROKER_ERRORS
from workers.broker.memory import MemoryDelivery, MemoryLeases
from workers.broker.memory_broker import MemoryBroker
from workers.broker.seal import Seal
from workers.ends.settler import Settler
from workers.observe.observers import STEPS, Observer, Observers
from workers.path.intake import Intake, IntakeContext
from workers.path.run_limits import RunLimits
from workers.path.runner import Event
from workers.requests.ending import Ending
from workers.requests.inflight import InFlight, TimeLimits
from workers.routing.rescuer import Rescuer
from workers.routing.sweeper import Sweeper

LEASE_SECONDS = 10.0
STALE_SECONDS = LEASE_SECONDS / 3
MODEL = "echo"
REPLY = keys.reply_stream("caller")


def settings_of(*engines: EngineName, **limits: Any) -> Settings:
    """Settings of a fleet with these engines and one model, ``echo``, that each of them serves."""
    return Settings(
        optimization=OptimizationSettings(
            engine_preference=engines,
            **{name: limits.pop(name) for name in ("batcher", "retry", "breaker") if name in limits},
        ),
        models=ModelsSettings(
            catalog={MODEL: ModelSpec(path="fake", kinds=(Kind.GENERATE, Kind.EMBED), engines=engines)}
        ),
        fleet=FleetSettings(lease_seconds=LEASE_SECONDS, **limits),
    )


class Witness(Observer):
    """Writes down what observers are told of each request, and of batches."""

    def __init__(self) -> None:
        self.steps: defaultdict[InFlight, list[str]] = defaultdict(list)
        self.endings: list[Ending] = []
        self.batches: Counter[str] = Counter()

    def request_received(self, item: InFlight) -> None:
        self.steps[item].append("received")

    def batch_started(self, engine: EngineName, items: Sequence[InFlight]) -> None:
        self.batches["started"] += 1
        for item in items:
            self.steps[item].append("started")

    def batch_ended(self, engine: EngineName, size: int, seconds: float) -> None:
        self.batches["ended"] += 1

    def request_ended(self, ending: Ending) -> None:
        self.steps[ending.item].append("ended")
        self.endings.append(ending)

    def request_left(self, item: InFlight) -> None:
        self.steps[item].append("left")

    def lease_lost(self, item: InFlight) -> None:
        self.steps[item].append("lost")


assert {"request_received", "request_ended", "request_left", "lease_lost"} <= set(STEPS)


class ToldCanvas:
    """What stands for the rest of canvases: it is told of endings, and fails where it is told to, before or after."""

    def __init__(self) -> None:
        self.told: list[Ending] = []
        self.failures: deque[Exception] = deque()

    def tell(self, ending: Ending) -> list[Any]:
        if self.failures:
            raise self.failures.popleft()
        self.told.append(ending)
        return []


def _texts(failures: dict[str, FleetError]) -> dict[str, str]:
    return {name: str(error) for name, error in failures.items()}


class MemoryFleet:
    """A broker, its clock, and the workers on it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.clock = ManualClock()
        self.broker = MemoryBroker(self.clock)
        self.seal = Seal(lambda: self.broker.seal, self.clock)
        self.workers: list[MemoryWorker] = []
        self.started = 0

    def worker(self, *engines: EngineName, slots: int | None = None) -> MemoryWorker:
        """Start a worker that serves the queues of these engines."""
        self.started += 1
        worker = MemoryWorker(self, f"w{self.started}", engines, slots)
        self.workers.append(worker)
        return worker

    def live(self) -> list[WorkerInfo]:
        """The workers that live."""
        return [worker.info for worker in self.workers if worker.announced]

    def submit(
        self,
        request_id: str,
        engine: EngineName = EngineName.FAKE,
        *,
        ours: bool = True,
        deliveries: int = 0,
        headers: dict[str, Any] | None = None,
        **fields: Any,
    ) -> bool:
        """Put a request on a queue, as our client does or as another sender; ``False`` where its id is taken."""
        request = InferenceRequest.parse({"id": request_id, "model": MODEL, "inputs": {"prompt": "cat"}, **fields})
        queue = keys.queue_of(engine)
        envelope = orjson.loads(wire.encode_request(request, queue, sent=self.clock(), reply=REPLY))
        envelope["headers"].update(headers or {})
        own = envelope["headers"][wire.HEADER]
        if deliveries:
            own.update(self.seal.sealed(envelope["headers"], deliveries=deliveries))
        if not ours:
            envelope["headers"][wire.HEADER] = {"reply": REPLY}
        name, message = keys.list_of(queue, request.priority.wire, request.tenant), wire.dumps(envelope)
        if ours:
            return self.broker.submit(name, request_id, message, deadline=request.deadline)
        self.broker.queues.push(keys.list_of(queue, Priority.NORMAL.wire), message, front=False)
        return True

    def cancel(self, request_id: str) -> bool:
        """A caller cancels."""
        return self.broker.cancel(request_id, wire.failure_meta(request_id, Cancelled(), status="REVOKED"))

    def status(self, request_id: str) -> str | None:
        """The status of the request's record."""
        record = self.broker.records.get(keys.result_key(request_id))
        return None if record is None else str(orjson.loads(record)["status"])

    def error(self, request_id: str) -> str:
        """The error in the request's record, with its type."""
        result = orjson.loads(self.broker.records[keys.result_key(request_id)])["result"]
        return f"{result['exc_type']}: {result['exc_message'][0]}"

    def answers(self, request_id: str) -> int:
        """How often the caller was answered."""
        return sum(orjson.loads(record)["task_id"] == request_id for record in self.broker.replies[REPLY])

    def pass_time(self, seconds: float, stalled: Sequence[MemoryWorker] = ()) -> None:
        """Let time pass; the leases of the workers are kept, but for those that are ``stalled``."""
        while seconds > 0:
            step = min(seconds, LEASE_SECONDS / 4)
            self.clock.advance(step)
            seconds -= step
            for worker in self.workers:
                if worker not in stalled:
                    worker.leases.keep()


class MemoryWorker:
    """One worker: what its composition root wires and its loop and transport call, called by the test."""

    def __init__(self, fleet: MemoryFleet, name: str, engines: Sequence[EngineName], slots: int | None) -> None:
        settings = fleet.settings
        self.fleet = fleet
        self.name = name
        self.engines = engines
        self.limits = LimitsInForce(Limits.of(settings))
        self.delivery = MemoryDelivery(fleet.broker, settings.fleet, self.limits, affinity=name)
        self.leases = MemoryLeases(fleet.broker, settings.fleet)
        self.witness = Witness()
        self.observers = Observers([self.witness])
        self.canvas = ToldCanvas()
        self.settler = Settler(self.delivery, self.leases, self.observers, self.canvas, fleet.seal)  # type: ignore[arg-type]
        self.sweeper = Sweeper(self.delivery, self.settler, self.limits, fleet.clock)
        self.rescuer = Rescuer(
            self.delivery, self.settler, self.limits, settings, name, fleet.live, clock=fleet.clock
        )  # fmt: skip
        self.loop = ManualLoop(fleet.clock)
        self.revoked: set[str] = set()
        self.time_limits: TimeLimits = (None, None)
        self.refresh_failures: deque[Exception] = deque()
        self.announced = True
        self.connected = False
        self.stopping = False
        self._claiming: set[str] = set()
        self.runners: dict[EngineName, ScriptedRunner] = {}
        self.intakes: dict[EngineName, Intake] = {}
        context = IntakeContext(
            settings, self.limits, self.delivery, self.leases, self.observers, self.settler, name, fleet.live,
            self._refresh, lambda: None, self.revoked, fleet.clock, RunLimits(lambda: self.time_limits, fleet.clock),
        )  # fmt: skip
        for engine in engines:
            models = scripted_models(settings, self.limits, engine, slots)
            runner = self.runners[engine] = ScriptedRunner(models, partial(self._report, engine))
            self.intakes[engine] = Intake(keys.queue_of(engine), runner, context)
        self.connect()

    def _report(self, engine: EngineName, event: Event) -> None:
        self.intakes[engine].report(event)

    def _refresh(self, since: float) -> None:
        if self.refresh_failures:
            raise self.refresh_failures.popleft()

    @property
    def info(self) -> WorkerInfo:
        """What it announces."""
        return WorkerInfo(
            id=self.name,
            host="test",
            pid=1,
            started=0.0,
            queues=tuple(keys.queue_of(engine) for engine in self.engines),
            engines=tuple(
                EngineInfo(name=engine, models=runner.models.status(), failed=_texts(runner.models.failures()))
                for engine, runner in self.runners.items()
            ),
        )

    @property
    def in_flight(self) -> int:
        return sum(intake.in_flight for intake in self.intakes.values())

    # -- the loop and its connection --------------------------------------------------------------------------------

    def do(self, work: Callable[[], object]) -> bool:
        """Do something on the loop. Where the broker fails the connection is lost until :meth:`connect`."""
        if not self.connected:
            return False
        try:
            work()
        except BROKER_ERRORS:
            self.connected = False
        return self.connected

    def connect(self, *, silent: bool = False) -> bool:
        """As the bootstep does at each connection. A pipelined connection that has gone ``silent`` is left."""
        self.connected = True
        if silent:
            self.delivery.lose()
        self.delivery.attach()
        self._claiming.clear()
        return self.do(self._connect)

    def _connect(self) -> None:
        self.tend()
        for intake in self.intakes.values():
            intake.attach(self.loop)

    def tend(self) -> None:
        """As the fleet does."""
        lost = self.leases.tend(self.delivery.wait)
        for intake in self.intakes.values():
            if lost:
                intake.forget(lost)
            intake.tend()
        self.observers.deliver()

    def turn(self) -> bool:
        """Let the loop turn: take in every answer, do what is due, claim what there is room for, until all is quiet."""
        for _ in range(100):
            before = (self.fleet.broker.queues.waiting(), len(self.fleet.broker.leases))
            if not self.do(self._turn):
                return False
            if before == (self.fleet.broker.queues.waiting(), len(self.fleet.broker.leases)):
                return True
        raise AssertionError("the loop does not come to rest")

    def _turn(self) -> None:
        self.loop.turn()
        for engine in self.engines:
            self.claim(engine)
        while self.delivery.answer():
            pass
        self.loop.turn()

    # -- the transport ----------------------------------------------------------------------------------------------

    def claim(self, engine: EngineName) -> None:
        """As the channel does where it knows that the queue holds messages."""
        queue = keys.queue_of(engine)
        room = self.intakes[engine].room()
        if room <= 0 or queue in self._claiming:
            return
        self._claiming.add(queue)
        then = partial(self._claimed, engine, self.fleet.clock())
        self.delivery.claim_soon(queue, room, then, partial(self._claiming.discard, queue))

    def _claimed(self, engine: EngineName, asked: float, claim: Claim) -> None:
        queue = keys.queue_of(engine)
        self._claiming.discard(queue)
        if not self.connected or self.fleet.clock() - asked > STALE_SECONDS:
            self.delivery.settle([Settlement.give_back(message.lease) for message in reversed(claim.messages)])
            return
        intake = self.intakes[engine]
        for message in claim.messages:
            try:
                envelope = wire.decode_envelope(message.payload)
            except BadRequest as error:
                item = InFlight.unreadable(message.lease, queue, message.payload, error)
                self.settler.end([Ending.refused(item, error)])
                continue
            self.fleet.seal.check(envelope)
            intake.receive(message.lease, envelope)
        intake.claim_delivered(claim)

    # -- stop -------------------------------------------------------------------------------------------------------

    def begin_stop(self) -> None:
        """The loop is over: take in what is under way."""
        self.stopping = True
        self.announced = False
        with suppress(*BROKER_ERRORS):
            self.delivery.detach()
        self.connected = True

    def wind_up(self, *, hurry: bool = False) -> bool:
        """Whether nothing is left here; ``False`` too where the broker fails."""
        try:
            through = [intake.wind_up(hurry) for intake in self.intakes.values()]
        except BROKER_ERRORS:
            return False
        return all(through)

    def leave(self) -> None:
        """It is gone, whether it is through or not."""
        self.announced = self.connected = False
        self.fleet.workers.remove(self)
