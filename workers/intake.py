"""The consumer of one engine's queue: claim -> batch -> run -> settle.

Everything here happens on the worker's event loop, except :meth:`Intake.report`, which the engine's thread calls. The
loop never waits for the engine.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import redis
from celery.worker import state
from kombu.asynchronous import Hub
from kombu.exceptions import OperationalError
from vine import promise

from shared import wire
from shared.contract import EngineName
from shared.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineError,
    FleetError,
    PayloadTooLarge,
    UndecodableMessage,
)
from shared.registry import WorkerInfo
from shared.settings import Settings
from workers import outcome
from workers.batcher import Batch, Batcher, BatchLimits
from workers.canvas import Canvas
from workers.delivery import Claim, Delivery, LeaseKeeper, Outcome
from workers.engines.base import EngineOutput
from workers.events import TaskObserver
from workers.fallback import Fallback, FallbackDecision
from workers.inflight import InFlight
from workers.results import result_of
from workers.runner import BatchDone, EngineRunner, Finished
from workers.sizes import TokenEstimator

logger = logging.getLogger(__name__)

PREFETCH_WINDOW = 0.02
"""Seconds. The next batch is claimed while one runs only where a batch usually takes no longer than this."""

PASS_ON_SECONDS = 0.02
"""How long a request that another worker of the queue must run stays out of reach of this one."""

SETTLE_CHUNK = 256


@dataclass(frozen=True, slots=True)
class Services:
    """What all intakes of a worker share."""

    settings: Settings
    delivery: Delivery
    leases: LeaseKeeper
    observer: TaskObserver
    canvas: Canvas
    worker_id: str
    live_workers: Callable[[], list[WorkerInfo]]
    refresh: Callable[[], None]


Ending = Callable[[], None]
"""What to tell observers once an outcome was written."""

BROKER_ERRORS = (redis.RedisError, OperationalError, OSError)
"""What a broker that fails raises, by way of the client library, of Celery, or of the socket."""


@dataclass(slots=True)
class _Ended:
    """An outcome to write, what must be done before it is, and what follows."""

    outcome: Outcome
    ending: Ending
    before: Ending | None = None


class Intake:
    """Takes an engine's messages from claim to outcome."""

    def __init__(self, queue: str, runner: EngineRunner, services: Services) -> None:
        self.queue = queue
        self.engine: EngineName = runner.models.engine.name
        self.accepting = True
        self._runner = runner
        self._services = services
        self._limits = limits_of(services.settings)
        self._batcher: Batcher[InFlight] = Batcher(self._limits)
        self._running: Batch[InFlight] | None = None
        self._reports: deque[Finished | BatchDone] = deque()
        self._outbox: list[_Ended] = []
        self._hub: Hub | None = None
        self._drain_soon = promise(self.drain)
        self._timer_at = float("inf")
        self._sizes = TokenEstimator(services.settings.optimization.batcher.length_buckets)
        self._fallback = Fallback(
            runner.models, services.settings, services.worker_id, services.live_workers, services.refresh
        )
        self._unfinished = 0

    # -- claim ------------------------------------------------------------------------------------------------------

    def attach(self, hub: Hub) -> None:
        """Run on this loop from now on; what is left over from the connection before is settled first."""
        self._hub = hub
        self._timer_at = float("inf")
        hub.call_soon(self._drain_soon)

    def room(self) -> int:
        """How many more requests could start soon: nothing is claimed that another worker could run earlier."""
        if not self.accepting or not self._runner.loaded.is_set():
            return 0
        if self._running is not None:
            if not self._ends_soon(self._running, time.time()):
                return 0
        most = self._limits.max_batch_size
        if self._sizes.mean:
            most = min(most, max(1, int(self._limits.max_batch_tokens / self._sizes.mean)))
        return most - len(self._batcher)

    def _ends_soon(self, batch: Batch[InFlight], now: float) -> bool:
        """Whether batches like this one are short, and this one has not proved to be another."""
        usual = self._batcher.expected_duration(batch.key)
        return usual is not None and usual <= PREFETCH_WINDOW and now - batch.items[0].started <= 2 * PREFETCH_WINDOW

    def receive(self, message: Any) -> None:
        """Take one claimed message over from kombu: from here on only its lease counts."""
        message.channel.qos.take(message.delivery_tag)
        body = message.body
        if message.headers.get("compression"):
            body = wire.dumps(message.payload)
        item = InFlight(message.delivery_tag, self.queue, message.headers, message.properties, body, time.time())
        self._services.leases.hold(item.lease)
        self._unfinished += 1
        try:
            self._admit(item)
        except UndecodableMessage as error:
            self._end(outcome.failed(item, error, dead_reason=str(error)), lambda: None)
        except FleetError as error:
            self._fail(item, error)
        except Exception as error:  # the boundary: no message may stop the loop that takes all the others
            logger.exception("request %s could not be taken in", item.id)
            self._fail(item, FleetError(f"the request could not be taken in: {type(error).__name__}"))

    def _admit(self, item: InFlight) -> None:
        largest = self._services.settings.fleet.max_payload_bytes
        if len(item.body) > largest:
            raise PayloadTooLarge(
                f"the request is {len(item.body)} bytes; at most {largest} are accepted (fleet.max_payload_bytes)"
            )
        eta = item.eta
        if eta is not None and eta > item.claimed:
            self._end(outcome.delayed(item.lease, eta), lambda: None)
            return
        args, kwargs, item.embed = item.decode()
        self._services.observer.received(item)
        item.request = request = item.validated(args, kwargs)
        if self._unwanted(item, item.claimed):
            return
        if not self._runner.models.serves(request.model, request.kind):
            self._go_on(item, self._fallback.elsewhere(request, item.hops))
            return
        last_moment = item.last_moment()
        if last_moment is not None:
            self._services.leases.hold(item.lease, last_moment)
        item.tokens = self._sizes.tokens(request)
        key = (request.model, self._runner.models.engine.compatibility(request), self._sizes.bucket(request))
        self._batcher.add(item, key, item.tokens, item.claimed)

    def claimed(self, claim: Claim) -> None:
        """All messages of a claim were received."""
        if claim.cancelled and len(self._batcher):
            self._drop_cancelled()
        self._flush()
        self.pump()

    def _drop_cancelled(self) -> None:
        waiting = [item.id for item in self._batcher]
        gone = self._services.delivery.cancelled_among(waiting)
        for item in self._batcher.remove(lambda item: item.id in gone):
            self._revoke(item, Cancelled(), expired=False)

    # -- batch ------------------------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Start the batch that is due, if the engine is free; otherwise come back when one is."""
        now = time.time()
        if self._running is None and len(self._batcher):
            for item in self._batcher.remove(lambda item: self._is_unwanted(item, now)):
                self._unwanted(item, now)
            batch = self._batcher.take(now)
            if batch is not None:
                self._start(batch, now)
            self._flush()
        due = self._batcher.due_at(now) if self._running is None else None
        if due is not None and due < self._timer_at and self._hub is not None:
            self._timer_at = due
            self._hub.call_later(max(0.0, due - now), self._on_timer)

    def _on_timer(self) -> None:
        self._timer_at = float("inf")
        self.pump()

    def _start(self, batch: Batch[InFlight], now: float) -> None:
        self._running = batch
        for item in batch.items:
            item.started = now
            self._services.observer.started(item)
            self._sizes.started(item.tokens)
        self._runner.submit(batch)
        if not self._ends_soon(batch, now):
            self._give_back_waiting()
        elif self._hub is not None:
            self._hub.call_later(2 * PREFETCH_WINDOW, self._relieve, batch)

    def _relieve(self, batch: Batch[InFlight]) -> None:
        """The batch takes longer than its like: let others have what was claimed in the hope that it would not."""
        if self._running is batch:
            self._give_back_waiting()
            self._flush()

    def _give_back_waiting(self) -> None:
        """What must wait for the running batch goes back where another worker of the queue can have it."""
        if not len(self._batcher):
            return
        me = self._services.worker_id
        if not any(self.queue in worker.queues for worker in self._services.live_workers() if worker.id != me):
            return
        for item in reversed(self._batcher.drain()):
            self._end(Outcome.give_back(item.lease), partial(self._services.observer.given_back, item))

    # -- run and settle ---------------------------------------------------------------------------------------------

    def report(self, event: Finished | BatchDone) -> None:
        """The engine's thread says what became of a member or a batch."""
        self._reports.append(event)
        if self._hub is not None:
            self._hub.call_soon(self._drain_soon)

    def drain(self) -> None:
        """Write the outcomes of what the engine reported, and start the next batch."""
        self._take_reports()
        if self._running is None:
            self.pump()
        self._flush()

    def _take_reports(self) -> None:
        while self._reports:
            # It leaves the queue when it is dealt with: where the broker fails on the way, it is dealt with again.
            event = self._reports[0]
            if isinstance(event, BatchDone):
                self._batcher.finished(event.batch.key, len(event.batch.items), event.seconds)
                self._running = None
            else:
                self._finish(event)
            self._reports.popleft()

    def _finish(self, done: Finished) -> None:
        item, request = done.item, done.item.request
        try:
            if isinstance(done.outcome, EngineOutput):
                self._succeed(item, done, done.outcome)
            elif done.outcome.hops and request is not None and self._services.settings.optimization.fallback_on_error:
                self._go_on(item, self._fallback.after_failure(request, item.hops, done.outcome))
            else:
                self._fail(item, done.outcome)
        except FleetError as error:
            self._fail(item, error)
        except OperationalError as error:  # Celery's word for a broker that fails while a canvas goes on
            raise ConnectionError(str(error)) from error
        except BROKER_ERRORS:
            raise
        except Exception as error:  # the boundary: an answer or a canvas that cannot be written is its own failure
            logger.exception("the outcome of request %s cannot be written", item.id)
            self._fail(item, EngineError(f"the {self.engine} engine's answer cannot be written: {error}"))

    def _succeed(self, item: InFlight, done: Finished, output: EngineOutput) -> None:
        now = time.time()
        if item.request is not None:
            self._sizes.learn(item.request, output.usage.prompt_tokens)
        result = result_of(done, output, self.engine, self._services.worker_id, now)
        children = self._services.canvas.succeeded(item, result)
        observer = self._services.observer
        self._end(
            outcome.succeeded(item, result, children), lambda: observer.succeeded(item, result, now - item.started)
        )

    def _go_on(self, item: InFlight, decision: FallbackDecision) -> None:
        """Send the request where it was decided that it goes."""
        now = time.time()
        observer, error = self._services.observer, decision.error
        if decision.engine is None:
            # The pause keeps it from coming straight back here.
            self._end(outcome.delayed(item.lease, now + PASS_ON_SECONDS), partial(observer.given_back, item))
            return
        if error is not None:
            logger.warning(
                "request %s hops from %s to %s: %s", item.id, self.engine, decision.engine, type(error).__name__
            )
        ending = partial(observer.given_back, item) if error is None else partial(observer.retried, item, error)
        self._end(outcome.hopped(item, decision.engine, error, self.engine, now), ending)

    def _fail(self, item: InFlight, error: FleetError) -> None:
        self._end(
            outcome.failed(item, error),
            lambda: self._services.observer.failed(item, error),
            before=partial(self._services.canvas.failed, item, error),
        )

    # -- expiry and cancellation ------------------------------------------------------------------------------------

    def _is_unwanted(self, item: InFlight, now: float) -> bool:
        expires = item.expires
        return (
            item.id in state.revoked
            or (expires is not None and now >= expires)
            or (item.request is not None and item.request.expired(now))
        )

    def _unwanted(self, item: InFlight, now: float) -> bool:
        """End a request nobody wants any longer; ``False`` where it is still wanted."""
        expires = item.expires
        if item.id in state.revoked:
            self._revoke(item, Cancelled(), expired=False)
        elif expires is not None and now >= expires:
            self._revoke(item, Cancelled("the task expired before it was started"), expired=True)
        elif item.request is not None and item.request.expired(now):
            self._fail(item, DeadlineExceeded())
        else:
            return False
        return True

    def _revoke(self, item: InFlight, error: Cancelled, expired: bool) -> None:
        self._end(outcome.revoked(item, error), lambda: self._services.observer.revoked(item, expired))

    # -- outcomes ---------------------------------------------------------------------------------------------------

    def _end(self, ended: Outcome, ending: Ending, before: Ending | None = None) -> None:
        self._outbox.append(_Ended(ended, ending, before))

    def _flush(self) -> None:
        """Write every outcome that waits. Where the broker fails they stay, and are written when it is back."""
        while self._outbox:
            chunk = self._outbox[:SETTLE_CHUNK]
            for ended in chunk:
                self._prepare(ended)
            self._services.delivery.settle([ended.outcome for ended in chunk])
            del self._outbox[: len(chunk)]
            self._services.leases.release([ended.outcome.lease for ended in chunk])
            self._unfinished -= len(chunk)
            for ended in chunk:
                ended.ending()

    def _prepare(self, ended: _Ended) -> None:
        """Do what comes before an outcome, once; where the broker fails it is tried again when it is back."""
        if ended.before is None:
            return
        try:
            ended.before()
        except OperationalError as error:
            raise ConnectionError(str(error)) from error
        except BROKER_ERRORS:
            raise
        except Exception:  # the boundary: a canvas that cannot be told keeps no request from its answer
            logger.exception("the canvas of a failed request cannot be told")
        ended.before = None

    @property
    def in_flight(self) -> int:
        """Requests claimed and not settled."""
        return self._unfinished

    # -- shutdown ---------------------------------------------------------------------------------------------------

    def give_back(self) -> None:
        """Claim no more, and return what waits to the queue at once."""
        self.accepting = False
        for item in reversed(self._batcher.drain()):
            self._end(Outcome.give_back(item.lease), partial(self._services.observer.given_back, item))
        self._flush()

    def finish(self, deadline: float) -> None:
        """Wait for the running batch until ``deadline`` (monotonic seconds); return what did not end to the queue."""
        while self._running is not None and time.monotonic() < deadline:
            if not self._reports:
                time.sleep(0.005)
            self._settle_reports()
        self._settle_reports()
        if self._running is not None:
            for item in self._running.items:
                self._end(Outcome.give_back(item.lease), lambda: None)
            logger.warning("%d requests did not end in time and went back to %s", len(self._running.items), self.queue)
            self._flush()

    def _settle_reports(self) -> None:
        self._take_reports()
        self._flush()


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
