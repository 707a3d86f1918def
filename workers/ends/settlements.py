"""What is written when a request ends: its record, its reply, and where its message goes. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from shared import keys, wire
from shared.contract import Hop
from shared.errors import BadRequest, FleetError
from workers.broker.delivery import Deadline, Settlement
from workers.requests.ending import End, Ending
from workers.requests.inflight import InFlight

MOST_RETRIES = 2**31
"""A sender that says more has not counted."""


Write = Callable[..., dict[str, Any]]
"""Given a message's headers, what a worker writes into our own of them: :meth:`workers.broker.seal.Seal.sealed`."""


def _unsealed(_: Mapping[str, Any], **written: Any) -> dict[str, Any]:
    return written


def settlement_of(ending: Ending, children: Sequence[Any] = (), seal: Write = _unsealed) -> Settlement:
    """What an ending writes; ``children`` are the next steps of a canvas, which a success names in its record.

    Raises what ``seal`` does.
    """
    if ending.end is End.RESULT:
        return _result(ending, children)
    if ending.end is End.HOP:
        written = _hop(ending, seal)
    elif ending.redelivered:
        written = _redelivery(ending, seal)
    else:
        written = _WRITTEN[ending.end](ending)
    deadline = _deadline(ending.item)
    return written if deadline is None else replace(written, deadline=deadline)


def _deadline(item: InFlight) -> Deadline | None:
    """Until when its request is wanted, where it says so."""
    last = _last_moment(item) if item.address else None
    return None if last is None else Deadline(item.id, item.list_name, last)


def _last_moment(item: InFlight) -> float | None:
    try:
        return item.last_moment() if item.request is not None else None
    except BadRequest:  # what it says of its time is no time: that is what it ends with
        return None


def _result(ending: Ending, children: Sequence[Any]) -> Settlement:
    item = ending.item
    record = wire.success_meta(
        item.id, ending.encoded, content=item.content, extra=item.record_extra(), children=children
    )
    return Settlement(
        item.lease, _result_key(item), record, item.reply, request_id=item.address, deadline=_deadline(item)
    )


def _failure(ending: Ending) -> Settlement:
    return _told(ending.item, ending.error, "FAILURE")


def _revoked(ending: Ending) -> Settlement:
    return replace(_told(ending.item, ending.error, "REVOKED"), cancelled=ending.end is End.CANCEL)


def _dead(ending: Ending) -> Settlement:
    return _told(ending.item, ending.error, "FAILURE", dead_reason=ending.reason or str(ending.error))


def _hop(ending: Ending, seal: Write) -> Settlement:
    """A Celery retry with the same id, on the queue of the next engine.

    What failed here is written into the message's history; where nothing did (the request had merely come to a queue
    that cannot serve it) nothing is.
    """
    item, error = ending.item, ending.error
    if ending.to is None or ending.here is None:
        raise ValueError("a hop goes from one engine to another")
    hops = [hop.model_dump(mode="json") for hop in item.hops]
    if error is not None:
        hop = Hop(engine=ending.here, error=str(error)[:500], time=ending.at, outage=error.outage)
        hops.append(hop.model_dump(mode="json", exclude_defaults=True))
    queue = keys.queue_of(ending.to)
    before = item.headers.get("retries")
    retries = (before if isinstance(before, int) and 0 <= before < MOST_RETRIES else 0) + (error is not None)
    header = {**seal(item.headers, hops=hops), "sent": item.sent}
    message = wire.amended(item.envelope(queue), header=header, retries=retries)
    record = b"" if error is None else wire.failure_meta(item.id, error, status="RETRY", extra=item.record_extra())
    return Settlement(
        item.lease,
        result_key=_result_key(item) if record else "",
        record=record,
        push_list=keys.list_of(queue, item.priority, item.tenant),
        push_message=message,
        push_front=True,
    )


def _delay(ending: Ending) -> Settlement:
    item = ending.item
    last = _last_moment(item)
    due = ending.at if last is None else min(ending.at, last)
    return Settlement(item.lease, due_ms=round(due * 1000, 3), request_id=item.address)


def _give_back(ending: Ending) -> Settlement:
    item = ending.item
    if not ending.worker:
        return Settlement.give_back(item.lease)
    message = wire.amended(item.envelope(item.queue), header={"passed": list(dict.fromkeys(ending.passed))})
    lane = keys.list_of(item.queue, item.priority, item.tenant, ending.worker)
    return Settlement(item.lease, push_list=lane, push_message=message, push_front=True)


def _redelivery(ending: Ending, seal: Write) -> Settlement:
    item = ending.item
    header = seal(item.headers, deliveries=item.deliveries + 1)
    return Settlement.give_back(item.lease, wire.amended(item.envelope(item.queue), header=header))


def _nothing(ending: Ending) -> Settlement:
    return Settlement(ending.item.lease)


_WRITTEN: Mapping[End, Callable[[Ending], Settlement]] = {
    End.FAILURE: _failure,
    End.CANCEL: _revoked,
    End.EXPIRY: _revoked,
    End.DELAY: _delay,
    End.DEAD_LETTER: _dead,
    End.GIVE_BACK: _give_back,
    End.REFUSAL: _dead,
    End.DUPLICATE: _nothing,
}


def _told(item: InFlight, error: FleetError | None, status: str, dead_reason: str = "") -> Settlement:
    """The caller is told of an error; with ``dead_reason`` the message is kept among the dead letters."""
    if error is None:
        raise ValueError(f"an ending with the status {status} needs its error")
    if not item.address:  # it names nothing that its sender could ask under
        return Settlement(item.lease, dead_reason=dead_reason)
    record = wire.failure_meta(item.address, error, status=status, content=item.content, extra=item.record_extra())
    return Settlement(
        item.lease, _result_key(item), record, item.reply, dead_reason=dead_reason, request_id=item.address
    )


def _result_key(item: InFlight) -> str:
    """Where the result is kept; nowhere when the sender asked for none."""
    return "" if item.headers.get("ignore_result") is True else keys.result_key(item.address or item.id)
