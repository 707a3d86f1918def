"""From a ``timeout`` to a deadline, reckoned from when the fleet first saw the request, not by its sender's clock."""

from __future__ import annotations

from workers.broker.delivery import Deadline, Delivery
from workers.requests.inflight import InFlight


def reckon(item: InFlight, delivery: Delivery, now: float) -> None:
    """Give a request with a ``timeout`` its deadline, by the broker's clock: that which was noted first.

    Raises what a broker that fails raises.
    """
    request = item.request
    if request is None or request.timeout is None:
        return
    last = item.last_moment()
    until = now + request.timeout if last is None else min(last, now + request.timeout)
    (at,) = delivery.deadlines([Deadline(item.id, item.list_name, until)])
    item.request = request.model_copy(update={"deadline": at})
