"""What waits on a queue that no live worker serves moves on to the next engine that can serve it, or fails.

Where this stands in a request's way: ``docs/life-of-a-request.md``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from shared import keys, wire
from shared.contract import TASK_NAME, EngineName
from shared.errors import BadRequest, DeadlineExceeded, EngineOutage, FleetError
from shared.limits import LimitsInForce
from shared.registry import WorkerInfo
from shared.settings import Settings
from workers.broker.delivery import Delivery, LeasedMessage
from workers.ends.settler import Settler
from workers.requests.ending import Ending
from workers.requests.inflight import InFlight
from workers.routing.fallback import Fallback, ending_of

logger = logging.getLogger(__name__)

AT_ONCE = 32
"""Messages that are claimed together: nobody keeps their leases, so they are to end soon."""
MOST = 4096
"""Messages that one look moves."""


class Rescuer:
    """Run it at every heartbeat of every worker: claims are atomic, so it needs no lock.

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
        self._due: dict[EngineName, float] = {}
        self._fallbacks = {
            # Nothing is asked anew for each message: the heartbeat that looks has just asked who lives.
            engine: Fallback(engine, None, settings, worker_id, live_workers, refresh=lambda _: None, clock=clock)
            for engine in EngineName
        }

    def look(self, now: float) -> int:
        """Move what has waited long enough; returns how many messages. ``now`` is in seconds of a steady clock."""
        served = {queue for worker in self._live_workers() for queue in worker.queues}
        moved = 0
        for engine in EngineName:
            if keys.queue_of(engine) in served:
                self._due.pop(engine, None)
            elif now >= self._due.setdefault(engine, now + self._limits.now.rescue_after_seconds):
                moved += self._move(engine)
        return moved

    def _move(self, engine: EngineName) -> int:
        moved = 0
        while moved < MOST:
            claim = self._delivery.claim(keys.queue_of(engine), AT_ONCE)
            if not claim.messages:
                break
            endings = [self.ending_of(engine, message, claim.now) for message in claim.messages]
            if claim.cancelled:
                gone = self._delivery.cancelled_among([ending.item.id for ending in endings])
                endings = [Ending.cancelled(one.item) if one.item.id in gone else one for one in endings]
            self._settler.end(endings, on_loop=False)
            moved += len(claim.messages)
        if moved:
            logger.warning("no live worker serves %s: %d requests of its queue were dealt with", engine, moved)
        return moved

    def ending_of(self, engine: EngineName, message: LeasedMessage, now: float) -> Ending:
        """Where one message goes. ``now`` is in seconds since the epoch."""
        queue = keys.queue_of(engine)
        try:
            envelope = wire.decode_envelope(message.payload, self._limits.now.max_payload_bytes)
            item = InFlight(message.lease, queue, envelope["headers"], envelope["properties"], envelope["body"], now)
            if item.headers.get("task") != TASK_NAME:
                raise BadRequest(f"there is no task {item.headers.get('task')!r} here; there is {TASK_NAME}")
            args, kwargs, item.embed = item.decode()
        except BadRequest as error:
            return Ending.refused(InFlight.unreadable(message.lease, queue, message.payload, error), error)
        gone = EngineOutage(f"no live worker serves the {engine} queue")
        try:
            item.request = request = item.validated(args, kwargs)
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
