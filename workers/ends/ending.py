"""How a request can end, as values: result, failure, revocation, hop, delay, dead letter.

Nothing here talks to the broker; :class:`workers.broker.delivery.Delivery` writes what these functions return.
"""

from __future__ import annotations

from typing import Any

from shared import keys, wire
from shared.contract import EngineName, Hop
from shared.errors import FleetError
from workers.broker.delivery import Settlement
from workers.requests.inflight import InFlight

MOST_RETRIES = 2**31
"""A sender that says more has not counted."""


def succeeded(item: InFlight, result: bytes, children: list[Any] | None = None) -> Settlement:
    """The request was answered; ``result`` is JSON."""
    record = wire.success_meta(item.id, result, extra=item.record_extra(), children=children or ())
    return Settlement(item.lease, result_key=_result_key(item), record=record, reply=item.reply)


def failed(item: InFlight, error: FleetError, *, dead_reason: str = "") -> Settlement:
    """The request failed for good; with ``dead_reason`` its message is kept among the dead letters."""
    record = wire.failure_meta(item.id, error, extra=item.record_extra())
    return Settlement(
        item.lease, result_key=_result_key(item), record=record, reply=item.reply, dead_reason=dead_reason
    )


def revoked(item: InFlight, error: BaseException) -> Settlement:
    """The request was cancelled, or its ``expires`` passed."""
    record = wire.failure_meta(item.id, error, status="REVOKED", extra=item.record_extra())
    return Settlement(item.lease, result_key=_result_key(item), record=record, reply=item.reply)


def hopped(
    item: InFlight, engine: EngineName, error: FleetError | None, failed_engine: EngineName, now: float
) -> Settlement:
    """The request goes on to the queue of ``engine``: a Celery retry with the same id.

    With an ``error`` the hop is written into the message's history; without one (the request had merely come to a queue
    that cannot serve it) it is not.
    """
    hops = [hop.model_dump(mode="json") for hop in item.hops]
    if error is not None:
        hop = Hop(engine=failed_engine, error=str(error)[:500], time=now, outage=error.outage)
        hops.append(hop.model_dump(mode="json", exclude_defaults=True))
    queue = keys.queue_of(engine)
    header = {"hops": hops, "sent": item.sent}
    before = item.headers.get("retries")
    retries = (before if isinstance(before, int) and 0 <= before < MOST_RETRIES else 0) + (error is not None)
    message = wire.amended(item.envelope(queue), header=header, retries=retries)
    record: bytes | str = ""
    if error is not None:
        record = wire.failure_meta(item.id, error, status="RETRY", extra=item.record_extra())
    return Settlement(
        item.lease,
        result_key=_result_key(item) if record else "",
        record=record,
        push_list=keys.list_of(queue, item.priority, item.tenant),
        push_message=message,
        push_front=True,
    )


def delayed(lease: str, due: float) -> Settlement:
    """The message waits in the broker until ``due`` (seconds since the epoch)."""
    return Settlement(lease, due_ms=int(due * 1000))


def _result_key(item: InFlight) -> str:
    """Where the result is kept; nowhere when the sender asked for none."""
    return "" if item.headers.get("ignore_result") is True else keys.result_key(item.id)
