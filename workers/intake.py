"""The consumer of one engine's queue: claim -> batch -> run -> settle.

Everything here happens on the worker's event loop, except :meth:`Intake.report`, which the engine's thread calls. The
loop never waits for the engine.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any

from celery.worker import state
from kombu.asynchronous import Hub
from vine import promise

from shared import wire
from shared.contract import EngineName, InferenceRequest
from shared.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineLoadError,
    FleetError,
    NoEngineAvailable,
    PayloadTooLarge,
    UndecodableMessage,
    UnknownModel,
    UnsupportedKind,
)
from shared.registry import WorkerInfo
from shared.routing import choose
from shared.settings import Settings
from workers import outcome
from workers.batcher import Batch, Batcher, BatchLimits
from workers.canvas import Canvas
from workers.delivery import Claim, Delivery, LeaseKeeper, Outcome
from workers.engines.base import EngineOutput
from workers.events import TaskObserver
from workers.inflight import InFlight
from workers.runner import BatchDone, EngineRunner, Finished

logger = logging.getLogger(__name__)

PREFETCH_WINDOW = 0.02
"""Seconds. The next batch is claimed while one runs only where a batch usually takes no longer than this."""

PASS_ON_SECONDS = 0.02
"""How long a request that another worker of the queue must run stays out of reach of this one."""

CHARACTERS_PER_TOKEN = 4.0
"""First guess; learnt per model from what engines report."""

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
        self._outbox: list[tuple[Outcome, Ending]] = []
        self._hub: Hub | None = None
        self._drain_soon = promise(self.drain)
        self._timer_at = float("inf")
        self._characters_per_token: dict[str, float] = {}
        self._mean_tokens = 0.0
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
            usual = self._batcher.expected_duration(self._running.key)
            if usual is None or usual > PREFETCH_WINDOW:
                return 0
        most = self._limits.max_batch_size
        if self._mean_tokens:
            most = min(most, max(1, int(self._limits.max_batch_tokens / self._mean_tokens)))
        return most - len(self._batcher)

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
            self._move_on(item, request)
            return
        last_moment = item.last_moment()
        if last_moment is not None:
            self._services.leases.hold(item.lease, last_moment)
        item.tokens = self._estimate_tokens(request)
        self._batcher.add(item, self._key(request, item.tokens), item.tokens, item.claimed)

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
            total = self._mean_tokens or float(item.tokens)
            self._mean_tokens = total + 0.05 * (item.tokens - total)
        self._runner.submit(batch)
        usual = self._batcher.expected_duration(batch.key)
        if len(self._batcher) and (usual is None or usual > PREFETCH_WINDOW):
            self._give_back_waiting()

    def _give_back_waiting(self) -> None:
        """Requests of another kind than the batch that just started: a worker that is idle can have them."""
        me = self._services.worker_id
        if not any(self.queue in worker.queues for worker in self._services.live_workers() if worker.id != me):
            return
        for item in reversed(self._batcher.drain()):
            self._end(Outcome.give_back(item.lease), partial(self._services.observer.given_back, item))

    def _key(self, request: InferenceRequest, tokens: int) -> Hashable:
        prompt = tokens - request.params.max_tokens
        buckets = self._services.settings.optimization.batcher.length_buckets
        bucket = sum(1 for edge in buckets if prompt > edge)
        return (request.model, self._runner.models.engine.compatibility(request), bucket)

    def _estimate_tokens(self, request: InferenceRequest) -> int:
        per_token = self._characters_per_token.get(request.model, CHARACTERS_PER_TOKEN)
        completion = request.params.max_tokens if request.generates else 0
        return int(request.inputs.characters() / per_token) + completion + 1

    # -- run and settle ---------------------------------------------------------------------------------------------

    def report(self, event: Finished | BatchDone) -> None:
        """The engine's thread says what became of a member or a batch."""
        self._reports.append(event)
        if self._hub is not None:
            self._hub.call_soon(self._drain_soon)

    def drain(self) -> None:
        """Write the outcomes of what the engine reported, and start the next batch."""
        while self._reports:
            event = self._reports.popleft()
            if isinstance(event, BatchDone):
                self._batcher.finished(event.batch.key, len(event.batch.items), event.seconds)
                self._running = None
            else:
                self._finish(event)
        if self._running is None:
            self.pump()
        self._flush()

    def _finish(self, done: Finished) -> None:
        item = done.item
        if isinstance(done.outcome, EngineOutput):
            self._succeed(item, done, done.outcome)
        elif done.outcome.hops and self._services.settings.optimization.fallback_on_error:
            self._hop(item, done.outcome)
        else:
            self._fail(item, done.outcome)

    def _succeed(self, item: InFlight, done: Finished, output: EngineOutput) -> None:
        now = time.time()
        request = item.request
        prompt_tokens = output.usage.prompt_tokens
        if request is not None and prompt_tokens:
            seen = request.inputs.characters() / prompt_tokens
            usual = self._characters_per_token.get(request.model, seen)
            self._characters_per_token[request.model] = max(0.1, usual + 0.1 * (seen - usual))
        result = {
            "outputs": output.outputs,
            "engine_used": self.engine,
            "latency_ms": round((now - item.sent) * 1000, 3),
            "batch_size": done.batch_size,
            "cache_hit": output.cache_hit,
            "metadata": {
                **output.metadata,
                "model": request.model if request is not None else "",
                "worker": self._services.worker_id,
                "timing": {
                    "queued_ms": round(max(0.0, item.claimed - item.sent) * 1000, 3),
                    "batched_ms": round(max(0.0, item.started - item.claimed) * 1000, 3),
                    "prefill_ms": round(output.prefill_ms, 3),
                    "decode_ms": round(output.decode_ms, 3),
                    "engine_ms": round(done.ran_ms, 3),
                },
                "usage": {
                    "prompt_tokens": prompt_tokens,
                    "completion_tokens": output.usage.completion_tokens,
                    "total_tokens": prompt_tokens + output.usage.completion_tokens,
                },
                "hops": [hop.model_dump(mode="json") for hop in item.hops],
            },
        }
        children = self._services.canvas.succeeded(item, result)
        observer = self._services.observer
        self._end(
            outcome.succeeded(item, result, children), lambda: observer.succeeded(item, result, now - item.started)
        )

    def _hop(self, item: InFlight, error: FleetError) -> None:
        request = item.request
        if request is None:
            raise ValueError("a request that was never decoded cannot hop")
        tried = {self.engine, *(hop.engine for hop in item.hops)}
        try:
            target = choose(request, self._services.live_workers(), self._services.settings, tried)
        except NoEngineAvailable:
            history = "; ".join([*(f"{hop.engine}: {hop.error}" for hop in item.hops), f"{self.engine}: {error}"])
            self._fail(item, type(error)(f"no engine could serve the request ({history})"))
            return
        observer = self._services.observer
        logger.warning("request %s hops from %s to %s: %s", item.id, self.engine, target, type(error).__name__)
        self._end(outcome.hopped(item, target, error, self.engine, time.time()), lambda: observer.retried(item, error))

    def _move_on(self, item: InFlight, request: InferenceRequest) -> None:
        """The request came to a queue whose engine here cannot serve it: another may.

        This is rare, and the answer is final, so it is given on fresh news of who lives.
        """
        self._services.refresh()
        if self._peer_serves(request):
            # Workers of one queue may have different models: leave it to one that has this. The pause keeps it from
            # coming straight back here.
            observer = self._services.observer
            self._end(outcome.delayed(item.lease, time.time() + PASS_ON_SECONDS), partial(observer.given_back, item))
            return
        failure = self._runner.models.failures().get(request.model)
        error = EngineLoadError(failure) if failure is not None else None
        tried = {self.engine, *(hop.engine for hop in item.hops)}
        try:
            target = choose(request, self._services.live_workers(), self._services.settings, tried)
        except NoEngineAvailable as unavailable:
            raise error or self._refusal(request, unavailable) from None
        observer = self._services.observer
        self._end(outcome.hopped(item, target, error, self.engine, time.time()), lambda: observer.given_back(item))

    def _peer_serves(self, request: InferenceRequest) -> bool:
        me = self._services.worker_id
        return any(
            worker.serves(self.engine, request.model, request.kind)
            for worker in self._services.live_workers()
            if worker.id != me
        )

    def _refusal(self, request: InferenceRequest, unavailable: NoEngineAvailable) -> FleetError:
        catalog = self._services.settings.models.catalog
        spec = catalog.get(request.model)
        if spec is None:
            known = ", ".join(sorted(catalog)) or "none"
            return UnknownModel(f"no model named {request.model!r} is declared; there are: {known}")
        if request.kind not in spec.kinds:
            kinds = ", ".join(spec.kinds)
            return UnsupportedKind(
                f"model {request.model!r} does not serve {request.kind} requests; it serves: {kinds}"
            )
        return unavailable

    def _fail(self, item: InFlight, error: FleetError) -> None:
        self._services.canvas.failed(item, error)
        self._end(outcome.failed(item, error), lambda: self._services.observer.failed(item, error))

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

    def _end(self, ended: Outcome, ending: Ending) -> None:
        self._outbox.append((ended, ending))

    def _flush(self) -> None:
        """Write every outcome that waits. Where the broker fails they stay, and are written when it is back."""
        while self._outbox:
            chunk = self._outbox[:SETTLE_CHUNK]
            self._services.delivery.settle([ended for ended, _ in chunk])
            del self._outbox[: len(chunk)]
            self._services.leases.release([ended.lease for ended, _ in chunk])
            self._unfinished -= len(chunk)
            for _, ending in chunk:
                ending()

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
        while self._reports:
            event = self._reports.popleft()
            if isinstance(event, BatchDone):
                self._running = None
            else:
                self._finish(event)
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
