"""Ends requests whose deadline passes while they wait on a list: nobody needs to claim one for its caller to be told.

Our client says the deadlines of its requests where it submits them; those of other senders are found by reading what
waits. Where this stands in a request's way: ``docs/life-of-a-request.md``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from shared import keys, wire
from shared.errors import BadRequest
from shared.limits import LimitsInForce
from workers.broker.delivery import Deadline, Delivery, Swept
from workers.ends.settler import Settler
from workers.requests.ending import Ending
from workers.requests.inflight import InFlight

logger = logging.getLogger(__name__)

LOOKS = 10
"""How often at most what waits is read on, one look after the other."""

MILLISECOND = 0.001

SHORTEST_PAUSE = 0.2
"""Seconds between two times at which late requests are ended: with many there is always one."""


class LateRequests:
    """Run it on the worker that watches; ``clock`` tells the broker's time in seconds since the epoch."""

    def __init__(self, delivery: Delivery, settler: Settler, limits: LimitsInForce, clock: Callable[[], float]) -> None:
        self._delivery = delivery
        self._settler = settler
        self._limits = limits
        self._clock = clock

    def look(self) -> None:
        """Read what others than our client have put on lists since the last time, for its deadlines."""
        for _ in range(LOOKS):
            more, messages = self._delivery.unread()
            found = [self.deadline_of(list_name, payload) for list_name, payload in messages]
            self._delivery.deadlines([deadline for deadline in found if deadline is not None])
            if not more:
                break

    def deadline_of(self, list_name: str, payload: bytes) -> Deadline | None:
        """Until when a message's request is wanted; ``None`` where it does not say, or is no request."""
        try:
            item = self._item("", list_name, payload)
            _, kwargs, _ = item.decode()
            times = [item.expires, _number(kwargs, "deadline")]
            if (timeout := _number(kwargs, "timeout")) is not None:
                times.append(self._clock() + timeout)
        except BadRequest:  # who claims it says so
            return None
        known = [at for at in times if at is not None]
        return Deadline(item.id, list_name, min(known)) if known and item.id else None

    def end(self) -> float:
        """End what is late; returns the seconds until it is worth asking again."""
        again, late = self._delivery.late()
        for swept in late:
            try:
                self._settler.end([self.ending_of(swept)])
            except ConnectionError as error:  # its lease lapses
                logger.warning("who waits for a late request cannot be told: %s", error)
        if late:
            logger.info("%d requests were late before they were claimed", len(late))
        return again if again == 0 else max(SHORTEST_PAUSE, again)

    def ending_of(self, swept: Swept) -> Ending:
        """What becomes of a message that was taken over because it is late."""
        queue = keys.queue_of_list(swept.list_name)
        try:
            item = self._item(swept.lease, swept.list_name, swept.payload)
            args, kwargs, item.embed = item.decode()
            item.request = item.validated(args, kwargs)
            if item.expires is not None and swept.deadline is not None and item.expires < swept.deadline + MILLISECOND:
                return Ending.expired(item)
        except BadRequest as error:
            return Ending.refused(InFlight.unreadable(swept.lease, queue, swept.payload, error), error)
        return Ending.late(item)

    def _item(self, lease: str, list_name: str, payload: bytes) -> InFlight:
        envelope = wire.decode_envelope(payload, self._limits.now.max_payload_bytes)
        queue = keys.queue_of_list(list_name)
        return InFlight(lease, queue, envelope["headers"], envelope["properties"], envelope["body"], self._clock())


def _number(kwargs: dict[str, object], name: str) -> float | None:
    request = kwargs.get("request")
    value = request.get(name) if isinstance(request, dict) else None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
