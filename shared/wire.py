"""Messages as they are on the queue: a Celery protocol 2 task in kombu's Redis envelope.

Any Celery app can write and read these. What our own client adds travels in one header, ``muai``::

    {"v": 1, "sent": seconds since the epoch, "reply": stream, "hops": [...], "deliveries": int}
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import orjson

from shared import keys
from shared.contract import CONTRACT_VERSION, TASK_NAME, InferenceRequest
from shared.errors import PayloadTooLarge, UndecodableMessage

HEADER = "muai"
_ORIGIN = f"muai{os.getpid()}@{socket.gethostname()}"
_EMBED = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


def encode_request(
    request: InferenceRequest, queue: str, *, sent: float, reply: str | None = None, max_bytes: int | None = None
) -> bytes:
    """One request as a message for ``queue``.

    Neither ``argsrepr`` nor ``kwargsrepr`` shows the inputs: those headers end up in events and logs.
    Raises :class:`PayloadTooLarge` above ``max_bytes``.
    """
    header: dict[str, Any] = {"v": CONTRACT_VERSION, "sent": sent}
    if reply is not None:
        header["reply"] = reply
    body = orjson.dumps([(), {"request": request.model_dump(mode="json", exclude_defaults=True)}, _EMBED])
    if max_bytes is not None and len(body) > max_bytes:
        raise PayloadTooLarge(
            f"the request is {len(body)} bytes; at most {max_bytes} are accepted (fleet.max_payload_bytes)"
        )
    task_id = request.id
    return orjson.dumps(
        {
            "body": body.decode(),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {
                "lang": "py",
                "task": TASK_NAME,
                "id": task_id,
                "shadow": None,
                "eta": None,
                "expires": None,
                "group": None,
                "group_index": None,
                "retries": 0,
                "timelimit": (None, None),
                "root_id": task_id,
                "parent_id": None,
                "argsrepr": "()",
                "kwargsrepr": f"{{'request': <{request.kind.value} {request.model}>}}",
                "origin": _ORIGIN,
                "ignore_result": False,
                "replaced_task_nesting": 0,
                "stamped_headers": None,
                "stamps": {},
                HEADER: header,
            },
            "properties": {
                "correlation_id": task_id,
                "reply_to": "",
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": queue},
                "priority": request.priority.wire,
                "body_encoding": None,
                "delivery_tag": task_id,
            },
        }
    )


def dumps(value: Any) -> bytes:
    """JSON, compact."""
    return orjson.dumps(value)


def loads_object(payload: bytes | str) -> dict[str, Any]:
    """A JSON object; raise :class:`UndecodableMessage` where it is anything else."""
    try:
        value = orjson.loads(payload)
    except orjson.JSONDecodeError as error:
        raise UndecodableMessage(f"the message is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UndecodableMessage("the message is not a JSON object")
    return value


def decode_envelope(payload: bytes) -> dict[str, Any]:
    """The envelope of a message; raise :class:`UndecodableMessage` where it is not one."""
    envelope = loads_object(payload)
    if not isinstance(envelope.get("properties"), dict) or not isinstance(envelope.get("headers"), dict):
        raise UndecodableMessage("the message has no headers or no properties: it was not written by Celery")
    if envelope.get("content-type") != "application/json":
        raise UndecodableMessage(
            f"the message's content type is {envelope.get('content-type')!r}; only application/json is accepted"
        )
    return envelope


def amended(envelope: Mapping[str, Any], *, header: Mapping[str, Any] | None = None, **headers: Any) -> bytes:
    """The same message with entries of our own header and plain headers replaced."""
    merged = {**envelope["headers"], **headers}
    if header is not None:
        merged[HEADER] = {**own_header(envelope["headers"]), **header}
    return orjson.dumps({**envelope, "headers": merged})


def own_header(headers: Mapping[str, Any]) -> dict[str, Any]:
    """Our entry among a message's headers, empty where the sender is not ours."""
    value = headers.get(HEADER)
    return value if isinstance(value, dict) else {}


def reply_of(headers: Mapping[str, Any]) -> str:
    """The reply stream that a message names; empty where it names none, or a key that is not for replies."""
    reply = own_header(headers).get("reply")
    if isinstance(reply, str) and reply.startswith(keys.REPLY_PREFIX) and len(reply) <= keys.LONGEST_KEY:
        return reply
    return ""


def success_meta(
    task_id: str,
    result: Mapping[str, Any],
    *,
    extra: Mapping[str, Any] | None = None,
    children: Sequence[Any] = (),
) -> bytes:
    """Celery's result record of a success that happened now."""
    return orjson.dumps(
        {
            "status": "SUCCESS",
            "result": result,
            "traceback": None,
            "children": children,
            "date_done": datetime.now(UTC),
            "task_id": task_id,
            **(extra or {}),
        }
    )


def failure_meta(
    task_id: str, error: BaseException, *, status: str = "FAILURE", extra: Mapping[str, Any] | None = None
) -> bytes:
    """Celery's result record of a failure, a retry or a revocation now, as its JSON serializer writes exceptions."""
    return orjson.dumps(
        {
            "status": status,
            "result": {
                "exc_type": type(error).__name__,
                "exc_message": [str(error)],
                "exc_module": type(error).__module__,
            },
            "traceback": None,
            "children": [],
            "date_done": datetime.now(UTC),
            "task_id": task_id,
            **(extra or {}),
        }
    )
