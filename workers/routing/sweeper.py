"""Takes over what dead workers left behind: counts the delivery, then back to its queue or to the dead letters.

Where this stands in a request's way: ``docs/life-of-a-request.md``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from shared import keys, wire
from shared.errors import BadRequest, DeadLettered
from shared.limits import LimitsInForce
from workers.broker.delivery import Delivery, Swept
from workers.ends.settler import Settler, oldest_in_front
from workers.requests.ending import End, Ending
from workers.requests.inflight import InFlight
from workers.routing.late import LateRequests

logger = logging.getLogger(__name__)

AT_ONCE = 256
"""Messages that one script puts back."""


class Sweeper:
    """Run it every second on every worker's loop; it needs no lock. ``clock`` tells seconds since the epoch."""

    def __init__(
        self, delivery: Delivery, settler: Settler, limits: LimitsInForce, clock: Callable[[], float] = time.time
    ) -> None:
        self._delivery = delivery
        self._settler = settler
        self._limits = limits
        self._clock = clock
        self._late = LateRequests(delivery, settler, limits, clock)

    def sweep(self, *, look: bool = True) -> float | None:
        """Sweep once; returns the seconds until something is due next, where this worker is to watch for it.

        Who watches ends what is late as well and, where it is to ``look``, reads what waits for when that is late.
        """
        next_due, swept = self._delivery.sweep()
        if swept:
            self._end([self.ending_of(message) for message in swept])
        if next_due is None:
            return None
        if look:
            self._late.look()
        return min(next_due, self._late.end())

    def _end(self, endings: Sequence[Ending]) -> None:
        """Each that may have a canvas by itself: where that cannot be told, the others have their ends."""
        back = oldest_in_front(ending for ending in endings if ending.end is End.GIVE_BACK)
        for first in range(0, len(back), AT_ONCE):
            self._settler.end(back[first : first + AT_ONCE])
        for ending in endings:
            if ending.end is End.GIVE_BACK:
                continue
            try:
                self._settler.end([ending])
            except ConnectionError as error:  # its lease lapses again
                logger.warning("who waits for request %s cannot be told: %s", ending.item.id, error)
        logger.warning("%d expired leases taken over: %d back in their queues, %d given up",
                       len(endings), len(back), len(endings) - len(back))  # fmt: skip

    def ending_of(self, swept: Swept) -> Ending:
        """What becomes of a message whose worker is gone."""
        queue = keys.queue_of_list(swept.list_name)
        try:
            envelope = wire.decode_envelope(swept.payload)
        except BadRequest as error:
            return Ending.refused(InFlight.unreadable(swept.lease, queue, swept.payload, error), error)
        self._settler.seal.check(envelope)
        item = InFlight(swept.lease, queue, envelope["headers"], envelope["properties"], envelope["body"], 0.0)
        with suppress(BadRequest):  # who claims it says so
            args, kwargs, item.embed = item.decode()
            item.request = item.validated(args, kwargs)
            if item.expires is not None and item.expires <= self._clock():
                return Ending.expired(item)
            if item.request.expired(self._clock()):
                return Ending.late(item)
        if item.deliveries + 1 < self._limits.now.max_deliveries:
            return Ending.redelivery(item)
        reason = f"delivered {item.deliveries + 1} times, and no worker lived to answer it"
        return Ending.dead(item, DeadLettered(f"the request was given up: {reason}"), reason)
