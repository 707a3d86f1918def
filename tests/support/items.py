"""Requests in a worker's hands, made without a broker."""

from __future__ import annotations

from typing import Any

import orjson

from shared import keys, wire
from shared.contract import EngineName, InferenceRequest
from tests.support.memory_worker import MODEL, REPLY
from workers.requests.inflight import InFlight
from workers.requests.rows import Part, Rows


def whole(item: InFlight) -> Part:
    """All of a request that is read, as a batch has it."""
    if item.request is None:
        raise ValueError("it has no request")
    item.rows = Rows(item.request, [1] * item.request.rows)
    return Part(item, item.rows, 0, len(item.rows))


def item_of(request_id: str = "a", *, lease: str = "7", claimed: float = 1_800_000_000.0, **fields: Any) -> InFlight:
    """A request as our client sends it, claimed and read. What begins with ``header_`` goes into its headers."""
    headers = {name.removeprefix("header_"): fields.pop(name) for name in list(fields) if name.startswith("header_")}
    request = InferenceRequest.parse({"id": request_id, "model": MODEL, "inputs": {"prompt": "cat"}, **fields})
    queue = keys.queue_of(EngineName.FAKE)
    envelope = orjson.loads(wire.encode_request(request, queue, sent=claimed - 1, reply=REPLY))
    item = InFlight(lease, queue, {**envelope["headers"], **headers}, envelope["properties"], envelope["body"], claimed)
    item.request = request
    return item
