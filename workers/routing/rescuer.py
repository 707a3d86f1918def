"""What waits on a queue that no live worker serves moves on to the next engine that can serve it, or fails.

Where this stands in a request's way: ``docs/life-of-a-request.md``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from shared import keys, wire
from shared.contract import TASK_NAME, EngineName
from shared.errors import BadRequest, DeadlineExceeded, EngineOutage, FleetError
from shared.limits import LimitsInForce
from shared.registry import WorkerInfo
from shared.settings import Settings
from workers.broker.delivery import Delivery, LeasedMessage, Settlement, lease_order
from workers.broker.errors import BROKER_ERRORS
from workers.ends.settler import Settler, oldest_in_front
from workers.requests.ending import Ending
from workers.requests.inflight import InFlight
from workers.requests.timeouts import reckon
from workers.routing.fallback import Fallback, ending_of

logger = logging.getLogger(__name__)

AT_ONCE = 128
"""Messages that are claimed, or ended, together."""
MOST, MOST_BYTES = 2048, 32 * 1024 * 1024
"""What one look moves, about: nobody keeps the leases, so they are to end soon."""


class Rescuer:
    """Run it at every heartbeat of every worker; the one with the least name does it for all.

    What moves goes in front of what waits where it comes to, in the order in which it has waited.
    ``clock`` tells seconds since the epoch.
    """

    def __init__(
        self,
        delivery: Delivery,
        settler: Settler,
        limits: LimitsInForce,
        settings: Settings,
        worker_id: str,
        live_workers: Callable[[], Sequence[WorkerInfo]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._delivery = delivery
        self._settler = settler
        self._limits = limits
        self._live_workers = live_workers
        self._worker_id = worker_id
        self._due: dict[EngineName, float] = {}
        self._fallbacks = {
            # Nothing is asked anew for each message: the heartbeat that looks has just asked who lives.
            engine: Fallback(engine, None, settings, worker_id, live_workers, refresh=lambda _: None, clock=clock)
            for engine in EngineName
        }

    def look(self, now: float) -> int:
        """Move what has waited long enough; returns how many messages. ``now`` is in seconds of a steady clock."""
        live = self._live_workers()
        served = {queue for worker in live for queue in worker.queues}
        mine, moved = self._worker_id <= min((worker.id for worker in live), default=self._worker_id), 0
        for engine in EngineName:
            if keys.queue_of(engine) in served:
                self._due.pop(engine, None)
            elif now >= self._due.setdefault(engine, now + self._limits.now.rescue_after_seconds) and mine:
                moved += self._move(engine)
        return moved

    def _move(self, engine: EngineName) -> int:
        endings, size = list[Ending](), 0
        while len(endings) < MOST and size < MOST_BYTES:
            claim = self._delivery.claim(keys.queue_of(engine), AT_ONCE)
            if not claim.messages:
                break
            found = [self.ending_of(engine, message, claim.now) for message in claim.messages]
            if claim.cancelled:
                gone = self._delivery.cancelled_among([ending.item.id for ending in found])
                found = [Ending.cancelled(one.item) if one.item.id in gone else one for one in found]
            endings += found
            size += sum(len(message.payload) for message in claim.messages)
        self._end(oldest_in_front(endings))
        if endings:
            logger.warning("no live worker serves %s: %d requests of its queue were dealt with", engine, len(endings))
        return len(endings)

    def _end(self, endings: Sequence[Ending]) -> None:
        """Where the broker fails, what is left is put back, or its leases lapse."""
        done = 0
        try:
            for done in range(0, len(endings), AT_ONCE):
                self._settler.end(endings[done : done + AT_ONCE], on_loop=False)
        except BROKER_ERRORS:
            left = sorted((ending.item.lease for ending in endings[done:]), key=lease_order, reverse=True)
            with suppress(*BROKER_ERRORS):
                self._delivery.settle([Settlement.give_back(lease) for lease in left])
            raise

    def ending_of(self, engine: EngineName, message: LeasedMessage, now: float) -> Ending:
        """Where one message goes. ``now`` is in seconds since the epoch."""
        queue = keys.queue_of(engine)
        try:
            envelope = wire.decode_envelope(message.payload, self._limits.now.max_payload_bytes)
            self._settler.seal.check(envelope)
            item = InFlight(message.lease, queue, envelope["headers"], envelope["properties"], envelope["body"], now)
            if item.headers.get("task") != TASK_NAME:
                raise BadRequest(f"there is no task {item.headers.get('task')!r} here; there is {TASK_NAME}")
            args, kwargs, item.embed = item.decode()
        except BadRequest as error:
            return Ending.refused(InFlight.unreadable(message.lease, queue, message.payload, error), error)
        gone = EngineOutage(f"no live worker serves the {engine} queue")
        try:
            item.request = item.validated(args, kwargs)
            reckon(item, self._delivery, now)
            request = item.request
            if item.due > now:
                return Ending.delayed(item, item.due)
            if item.expires is not None and item.expires <= now:
                return Ending.expired(item)
            if request.expired(now):
                raise DeadlineExceeded(f"the request's deadline passed ({gone})")
            decision = self._fallbacks[engine].elsewhere(request, item.hops, item.sent)
        except FleetError as error:
            return Ending.failed(item, error)
        return ending_of(replace(decision, error=gone), item, here=engine, now=now)
