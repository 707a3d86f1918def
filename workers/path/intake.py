"""The consumer of one engine's queue: claim -> batch -> run -> settle.

Everything here happens on the worker's event loop, except :meth:`Intake.report`, which the engine's thread calls. The
loop never waits for the engine.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from traceback import format_tb
from typing import Any

from celery.worker import state
from kombu.asynchronous import Hub
from kombu.exceptions import OperationalError
from vine import promise

from shared import wire
from shared.contract import EngineName, InferenceRequest
from shared.errors import (
    AnswerTooLarge,
    Cancelled,
    DeadlineExceeded,
    EngineError,
    FleetError,
    UndecodableMessage,
)
from shared.registry import WorkerInfo
from shared.settings import Settings
from workers.broker.delivery import LEFT_OUT_SECONDS, Claim, Delivery, Verdict
from workers.broker.leases import LeaseKeeper
from workers.ends.canvas import Canvas
from workers.ends.outbox import BROKER_ERRORS, Outbox
from workers.engines.base import EngineOutput
from workers.observe.celery_events import TaskObserver
from workers.path.batcher import Batch, Batcher, BatchLimits, FlushReason
from workers.path.results import result_of
from workers.path.runner import BatchDone, EngineRunner, Event, Finished
from workers.requests.inflight import InFlight
from workers.requests.sizes import TokenEstimator
from workers.routing.fallback import Fallback, FallbackDecision

logger = logging.getLogger(__name__)

PREFETCH_WINDOW = 0.02
"""Seconds before the running batch is expected to end at which the next one is claimed."""

AHEAD_SHARE = 0.25
"""How much more than can run is claimed for an engine that batches by itself, so that no slot waits for the broker."""

SAME_ID_SECONDS = 1.0
"""How long a message waits while another of the same id is under way."""

ALONE = "alone"
"""Key of a batch whose one member runs by itself."""


@dataclass(frozen=True, slots=True)
class IntakeContext:
    """What all intakes of a worker share."""

    settings: Settings
    delivery: Delivery
    leases: LeaseKeeper
    observer: TaskObserver
    canvas: Canvas
    worker_id: str
    live_workers: Callable[[], list[WorkerInfo]]
    refresh: Callable[[float], None]
    announce: Callable[[], None]


class Intake:
    """Takes an engine's messages from claim to outcome."""

    def __init__(self, queue: str, runner: EngineRunner, services: IntakeContext) -> None:
        self.queue = queue
        self.engine: EngineName = runner.models.engine.name
        self.accepting = True
        self._runner = runner
        self._services = services
        self._limits = limits_of(services.settings)
        self._slots = runner.slots
        if runner.continuous:
            self._slots += int(AHEAD_SHARE * self._slots)
            self._limits = self._limits.unbatched()
        self._batcher: Batcher[InFlight] = Batcher(self._limits)
        self._running: dict[str, Batch[InFlight]] = {}
        self._resting: set[InFlight] = set()
        self._foreign: list[InFlight] = []
        self._alone: InFlight | None = None  # waits for the end of what runs, or runs by itself
        self._reports: deque[Event] = deque()
        self._done: deque[BatchDone] = deque()
        self._outbox = Outbox(services.delivery, services.leases, services.observer, services.canvas)
        self._hub: Hub | None = None
        self._drain_soon = promise(self.drain)
        self._timer_at = float("inf")
        self._sizes = TokenEstimator(services.settings.optimization.batcher.length_buckets)
        self._fallback = Fallback(
            self.engine, runner.models, services.settings, services.worker_id, services.live_workers, services.refresh
        )
        self._taken = 0

    # -- claim ------------------------------------------------------------------------------------------------------

    def attach(self, hub: Hub) -> None:
        """Run on this loop from now on; what is left over from the connection before is settled first."""
        self._hub = hub
        self._timer_at = float("inf")
        hub.call_soon(self._drain_soon)

    def room(self) -> int:
        """How many more requests could start soon: nothing is claimed that another worker could run earlier."""
        if not self.accepting or not self._runner.loaded.is_set() or self._alone is not None:
            return 0
        if self._runner.continuous:
            return self._slots - len(self._running) - len(self._batcher)
        now = time.time()
        if not all(self._ends_soon(batch, now) for batch in self._running.values()):
            return 0
        most = self._limits.max_batch_size
        if self._sizes.mean:
            most = min(most, max(1, int(self._limits.max_batch_tokens / self._sizes.mean)))
        return most - len(self._batcher)

    def _ends_soon(self, batch: Batch[InFlight], now: float) -> bool:
        """Whether the batch is about to end, going by its like, and is not overdue."""
        usual = self._batcher.expected_duration(batch.key)
        return usual is not None and abs(batch.items[0].started + usual - now) <= PREFETCH_WINDOW

    def receive(self, lease: str, envelope: dict[str, Any]) -> None:
        """Take one claimed request over: from here on only its lease counts."""
        self._services.leases.hold(lease)
        item = InFlight(lease, self.queue, envelope["headers"], envelope["properties"], envelope["body"], time.time())
        self._taken += 1
        try:
            self._admit(item)
        except UndecodableMessage as error:
            self._outbox.bury(item, error)
        except FleetError as error:
            self._outbox.fail(item, error)
        except Exception as error:  # noqa: BLE001  # the boundary: no message may stop the loop that takes all the others
            logger.error("request %s could not be taken in: %s\n%s", item.id, type(error).__name__, _frames(error))
            self._outbox.fail(item, FleetError(f"the request could not be taken in: {type(error).__name__}"))

    def _admit(self, item: InFlight) -> None:
        wire.check_body(item.body, self._services.settings.fleet.max_payload_bytes)
        eta = item.eta
        if eta is not None and eta > item.claimed:
            self._outbox.delay(item, eta)
            return
        args, kwargs, item.embed = item.decode()
        self._services.observer.received(item)
        item.request = request = item.validated(args, kwargs)
        if self._unwanted(item, item.claimed):
            return
        if not self._runner.models.serves(request.model, request.kind, request.features):
            self._go_on(item, self._fallback.elsewhere(request, item.hops, item.sent))
            return
        last_moment = item.last_moment()
        if last_moment is not None:
            self._services.leases.hold(item.lease, last_moment)
        item.tokens = self._sizes.tokens(request)
        if item.foreign:
            self._foreign.append(item)
        else:
            self._wait(item, request, item.claimed)

    def _wait(self, item: InFlight, request: InferenceRequest, now: float) -> None:
        key: Hashable = self._key(request)
        if 0 < item.deliveries >= self._services.settings.fleet.max_deliveries - 1:
            # The last try of what may be what its workers died of is made alone: it takes nobody along.
            key = ALONE
            if self._alone is None:
                self._alone = item
                return
        self._batcher.add(item, key, item.tokens, now)

    def _key(self, request: InferenceRequest) -> Hashable:
        """Requests with the same key may share a batch."""
        return request.model, self._runner.models.engine.compatibility(request), self._sizes.bucket(request)

    def claim_delivered(self, claim: Claim) -> None:
        """All messages of a claim were received."""
        self._begin_foreign()
        if claim.left_out and self._hub is not None:
            self._hub.call_later(LEFT_OUT_SECONDS, lambda: None)  # the loop claims when it wakes
        if claim.cancelled and len(self._batcher):
            self._drop_cancelled()
        self._outbox.flush()
        self.pump()

    def _begin_foreign(self) -> None:
        """Other senders may use an id twice: such a message waits for the other one, and ends with its answer."""
        verdicts = self._services.delivery.begin([(item.lease, item.id) for item in self._foreign])
        foreign, self._foreign = self._foreign, []
        for item, verdict in zip(foreign, verdicts, strict=True):
            if verdict is Verdict.RUN and item.request is not None:
                self._wait(item, item.request, item.claimed)
                continue
            if verdict is Verdict.DONE:
                self._outbox.drop(item)
            else:
                self._outbox.delay(item, item.claimed + SAME_ID_SECONDS)

    def _drop_cancelled(self) -> None:
        waiting = [item.id for item in self._batcher]
        gone = self._services.delivery.cancelled_among(waiting)
        for item in self._batcher.remove(lambda item: item.id in gone):
            self._outbox.revoke(item, Cancelled(), expired=False)

    def tend(self) -> None:
        """End what runs and is not wanted any longer, and let the engine know."""
        running = self._open()
        if not running:
            return
        gone = self._services.delivery.cancelled_among([item.id for item in running])
        now = time.time()
        for item in running:
            if item.id in gone:
                self._outbox.revoke(item, Cancelled(), expired=False)
            elif not self._unwanted(item, now):
                continue
            self._runner.abort(item)
        self._outbox.flush()

    def forget(self, leases: Collection[str]) -> None:
        """Drop requests that other workers have taken over: what runs is ended, and nothing is answered."""
        rested = {item for item in self._resting if item.lease in leases}
        self._resting -= rested
        waited = self._batcher.remove(lambda item: item.lease in leases)
        waited += [item for item in self._foreign if item.lease in leases]
        self._foreign = [item for item in self._foreign if item.lease not in leases]
        running = [item for item in self._open() if item.lease in leases]
        for item in running:
            self._runner.abort(item)
        if self._alone is not None and self._alone.lease in leases and self._alone.lease not in self._running:
            waited.append(self._alone)
            self._alone = None
        for item in rested.union(waited, running):  # one that is to run again may be among what runs as well
            item.ended = True
            self._taken -= 1
            self._services.observer.given_back(item)

    def _open(self) -> list[InFlight]:
        """What was handed to the engine and has no outcome yet."""
        return [item for batch in self._running.values() for item in batch.items if not item.ended]

    # -- batch ------------------------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Start what is due, where the engine has room; otherwise come back when something is."""
        now = time.time()
        if self._alone is not None:
            self._pump_alone(self._alone, now)
            return
        if len(self._running) < self._slots and len(self._batcher):
            for item in self._batcher.remove(lambda item: self._is_unwanted(item, now)):
                self._unwanted(item, now)
            while len(self._running) < self._slots and (batch := self._batcher.next_batch(now)) is not None:
                self._start(batch, now)
            self._outbox.flush()
        due = self._batcher.due_at(now) if len(self._running) < self._slots else None
        if due is not None and due < self._timer_at and self._hub is not None:
            self._timer_at = due
            self._hub.call_later(max(0.0, due - now), self._on_timer)

    def _pump_alone(self, item: InFlight, now: float) -> None:
        """Start it once nothing else is in this worker's hands."""
        self._put_back(self._batcher.drain())
        if not self._running and self._unwanted(item, now):
            self._alone = None
        self._outbox.flush(wait=True)  # before it starts: nothing of what was put back is to be lost with this worker
        if not self._running and self._alone is not None:
            self._start(Batch(ALONE, [item], item.tokens, FlushReason.SIZE, now - item.claimed), now)

    def _on_timer(self) -> None:
        self._timer_at = float("inf")
        self.pump()

    def _start(self, batch: Batch[InFlight], now: float) -> None:
        self._running[batch.items[0].lease] = batch
        for item in batch.items:
            item.started = now
        self._runner.submit(batch)
        for item in batch.items:
            self._services.observer.started(item)
            self._sizes.started(item.tokens)
        if self._runner.continuous:
            return
        if not self._ends_soon(batch, now):
            self._give_back_waiting()
        usual = self._batcher.expected_duration(batch.key)
        if usual is not None and self._hub is not None:
            # The loop claims when it wakes; it is woken in time for the next batch, and looks again when that is late.
            self._hub.call_later(max(0.0, usual - PREFETCH_WINDOW), self._relieve, batch)
            self._hub.call_later(usual + 1.1 * PREFETCH_WINDOW, self._relieve, batch)

    def _relieve(self, batch: Batch[InFlight]) -> None:
        """Where the batch takes longer than its like, let others have what was claimed in good hope."""
        if batch.items[0].lease in self._running and not self._ends_soon(batch, time.time()):
            self._give_back_waiting()
            self._outbox.flush()

    def _give_back_waiting(self) -> None:
        """What must wait for the running batch goes back where another worker of the queue can have it."""
        if not len(self._batcher):
            return
        me = self._services.worker_id
        if not any(self.queue in worker.queues for worker in self._services.live_workers() if worker.id != me):
            return
        self._put_back(self._batcher.drain())

    def _put_back(self, items: Sequence[InFlight]) -> None:
        """Return these to the front of the queue, in the order in which they came."""
        for item in reversed(items):
            self._outbox.give_back(item)

    # -- run and settle ---------------------------------------------------------------------------------------------

    def report(self, event: Event) -> None:
        """The engine's thread says what became of a member or a batch."""
        if isinstance(event, BatchDone):
            self._done.append(event)
        else:
            self._reports.append(event)
        if self._hub is not None:
            self._hub.call_soon(self._drain_soon)

    def drain(self) -> None:
        """Write the outcomes of what the engine reported, and start the next batch."""
        # A free engine first gets its next batch; then the outcomes of the last one are written.
        self._begin_foreign()
        self._take_done()
        if len(self._running) < self._slots:
            self.pump()
        self._take_reports()
        self._outbox.flush()

    def _take_done(self) -> None:
        while self._done:
            done = self._done.popleft()
            del self._running[done.batch.items[0].lease]
            if done.batch.key == ALONE:
                self._alone = None
            else:
                self._batcher.finished(done.batch.key, len(done.batch.items), done.seconds)

    def _take_reports(self) -> None:
        while self._reports:
            # It leaves the queue when it is dealt with: where the broker fails on the way, it is dealt with again.
            event = self._reports[0]
            if isinstance(event, Finished):
                self._finish(event)
            else:
                self._services.announce()
            self._reports.popleft()

    def _finish(self, done: Finished) -> None:
        item, request = done.item, done.item.request
        if item.ended:
            return
        try:
            if isinstance(done.outcome, EngineOutput):
                self._succeed(item, done, done.outcome)
            elif not self.accepting and (done.outcome.transient or done.outcome.outage):
                # A stopping worker's engine may go before it: that says nothing of the request.
                self._outbox.give_back(item)
            elif done.outcome.transient and self._try_again(item, done.outcome):
                return
            elif done.outcome.hops and request is not None and self._services.settings.optimization.fallback_on_error:
                self._go_on(item, self._fallback.after_failure(request, item.hops, done.outcome))
            else:
                self._outbox.fail(item, done.outcome)
        except FleetError as error:
            self._outbox.fail(item, error)
        except OperationalError as error:  # Celery's word for a broker that fails while a canvas goes on
            raise ConnectionError(str(error)) from error
        except BROKER_ERRORS:
            raise
        except Exception as error:  # noqa: BLE001  # the boundary: what cannot be written is its own request's failure
            # Its text may quote what the engine was given or has answered.
            logger.error(
                "the outcome of request %s cannot be written: %s\n%s", item.id, type(error).__name__, _frames(error)
            )
            self._outbox.fail(
                item, EngineError(f"the {self.engine} engine's answer cannot be written: {type(error).__name__}")
            )

    def _try_again(self, item: InFlight, error: FleetError) -> bool:
        """Let a request that met a passing error run again here after a pause; ``False`` where it has had enough."""
        retry = self._services.settings.optimization.retry
        pause = retry.backoff_ms / 1000 * 2**item.attempts
        last_moment = item.last_moment()
        if self._hub is None or item.attempts >= retry.attempts:
            return False
        if last_moment is not None and time.time() + pause >= last_moment:
            return False
        item.attempts += 1
        logger.info("request %s is tried again in %.0f ms: %s", item.id, pause * 1000, type(error).__name__)
        self._resting.add(item)
        self._hub.call_later(pause, self._come_back, item)
        return True

    def _come_back(self, item: InFlight) -> None:
        if item in self._resting and item.request is not None:
            self._resting.discard(item)
            self._wait(item, item.request, time.time())
            self.pump()

    def _succeed(self, item: InFlight, done: Finished, output: EngineOutput) -> None:
        now = time.time()
        if item.request is not None:
            self._sizes.learn(item.request, output.usage.prompt_tokens)
        result = result_of(done, output, self.engine, self._services.worker_id, now)
        encoded, most = wire.dumps(result), self._services.settings.fleet.max_result_bytes
        if len(encoded) > most:
            raise AnswerTooLarge(
                f"the answer is {len(encoded)} bytes; at most {most} are kept (fleet.max_result_bytes): ask for less"
            )
        children = self._services.canvas.succeeded(item, result)
        self._outbox.succeed(item, result, encoded, children, now - item.started)

    def _go_on(self, item: InFlight, decision: FallbackDecision) -> None:
        """Send the request where it was decided that it goes."""
        now, error = time.time(), decision.error
        if decision.engine is None:
            # The pause keeps it from coming straight back here.
            self._outbox.delay(item, min(now + decision.pause, item.last_moment() or float("inf")))
            return
        if error is not None:
            logger.warning(
                "request %s hops from %s to %s: %s", item.id, self.engine, decision.engine, type(error).__name__
            )
        self._outbox.hop(item, decision.engine, error, self.engine, now)

    # -- expiry and cancellation ------------------------------------------------------------------------------------

    def _is_unwanted(self, item: InFlight, now: float) -> bool:
        expires = item.expires
        return (
            item.id in state.revoked
            or (expires is not None and now >= expires)
            or (item.request is not None and item.request.expired(now + self._at_least(item)))
        )

    def _at_least(self, item: InFlight) -> float:
        """How many seconds a request that waits will take to run, going by the quickest of its like."""
        request = item.request
        if request is None or request.deadline is None or item.started:
            return 0.0
        return self._batcher.least_duration(self._key(request))

    def _unwanted(self, item: InFlight, now: float) -> bool:
        """End a request nobody wants any longer; ``False`` where it is still wanted."""
        expires = item.expires
        if item.id in state.revoked:
            self._outbox.revoke(item, Cancelled(), expired=False)
        elif expires is not None and now >= expires:
            self._outbox.revoke(item, Cancelled("the task expired before it was started"), expired=True)
        elif item.request is not None and item.request.expired(now):
            self._outbox.fail(item, self._late(item, item.request))
        elif item.request is not None and item.request.expired(now + (takes := self._at_least(item))):
            self._outbox.fail(
                item, DeadlineExceeded(f"the deadline cannot be met: such requests take {takes:.3f} s or more")
            )
        else:
            return False
        return True

    def _late(self, item: InFlight, request: InferenceRequest) -> DeadlineExceeded:
        """The error of a request whose deadline has passed, with what kept it from being answered."""
        reasons = [f"{hop.engine}: {hop.error}" for hop in item.hops]
        failure = self._runner.models.failures().get(request.model)
        if failure is not None:
            reasons.append(f"{self.engine}: {failure}")
        return DeadlineExceeded(f"the request's deadline passed ({'; '.join(reasons)})" if reasons else None)

    @property
    def in_flight(self) -> int:
        """Requests claimed and not settled."""
        return self._taken - self._outbox.settled

    # -- shutdown ---------------------------------------------------------------------------------------------------

    def wind_up(self, hurry: bool) -> bool:
        """Claim no more, return what waits to the queue, and write what has ended; ``True`` when nothing is left here.

        To be called again and again until it is, or there is no more time: then, to ``hurry``, what runs goes back too.
        """
        self.accepting = False
        self._take_done()
        self._take_reports()
        back = [*self._foreign, *self._batcher.drain(), *self._resting]
        self._foreign.clear()
        self._resting.clear()
        if self._alone is not None and self._alone.lease not in self._running:
            back.append(self._alone)
            self._alone = None
        running = self._open() if hurry else []
        self._put_back([*running, *back])
        for item in running:
            self._runner.abort(item)
        if running:
            logger.warning("%d requests did not end in time and go back to %s", len(running), self.queue)
        self._outbox.flush()
        return self.in_flight == 0

    @property
    def busy(self) -> bool:
        """Whether the engine has not come back with what it was given."""
        return bool(self._running)


def _frames(error: BaseException) -> str:
    return "".join(format_tb(error.__traceback__))


def limits_of(settings: Settings) -> BatchLimits:
    """The configured limits, for the batcher."""
    batcher = settings.optimization.batcher
    limits = BatchLimits(
        max_batch_size=batcher.max_batch_size,
        max_batch_tokens=batcher.max_batch_tokens,
        batch_timeout=batcher.batch_timeout_ms / 1000,
        adaptive=batcher.adaptive_batching,
        min_batch_size=batcher.min_batch_size,
    )
    return limits if batcher.enabled else limits.unbatched()
