"""Takes over what dead workers left behind: counts the delivery, then back to its queue or to the dead letters."""

from __future__ import annotations

import logging

from shared import keys, wire
from shared.errors import DeadLettered, UndecodableMessage
from workers.broker.delivery import Delivery, Settlement, Swept
from workers.ends import ending
from workers.requests.inflight import InFlight

logger = logging.getLogger(__name__)


class Sweeper:
    """Run it every few seconds in every worker; it needs no lock."""

    def __init__(self, delivery: Delivery, max_deliveries: int) -> None:
        self._delivery = delivery
        self._max_deliveries = max_deliveries

    def sweep(self) -> float | None:
        """Sweep once; returns the seconds until something is due next, ``None`` where nothing is leased or delayed."""
        next_due, taken = self._delivery.sweep()
        if taken:
            outcomes = [self.judge(swept) for swept in taken]
            self._delivery.settle(outcomes)
            dead = sum(1 for ended in outcomes if ended.dead_reason)
            logger.warning("%d expired leases taken over: %d back in their queues, %d dead-lettered",
                           len(taken), len(taken) - dead, dead)  # fmt: skip
        return next_due

    def judge(self, swept: Swept) -> Settlement:
        """What becomes of a message whose worker is gone."""
        try:
            envelope = wire.decode_envelope(swept.payload)
        except UndecodableMessage as error:
            return Settlement(swept.lease, dead_reason=str(error))
        headers = envelope["headers"]
        counted = wire.own_header(headers).get("deliveries")
        deliveries = (counted if isinstance(counted, int) else 0) + 1
        if deliveries < self._max_deliveries:
            return Settlement(
                swept.lease,
                push_list=swept.list_name,
                push_message=wire.amended(envelope, header={"deliveries": deliveries}),
                push_front=True,
            )
        item = InFlight(swept.lease, keys.queue_of_list(swept.list_name), headers, envelope["properties"], "", 0.0)
        reason = f"delivered {deliveries} times, and no worker lived to answer it"
        return ending.failed(item, DeadLettered(f"the request was given up: {reason}"), dead_reason=reason)
