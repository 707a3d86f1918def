"""Messages as they are on the queue: a Celery protocol 2 task in kombu's Redis envelope.

Any Celery app can write and read these. What our own client adds travels in one header, ``muai``::

    {"v": 1, "sent": seconds since the epoch, "content": digest of what is asked, "reply": stream, "hops": [...],
     "deliveries": int, "seal": hex, "signature": hex}
"""

from __future__ import annotations

import binascii
import bz2
import json
import lzma
import math
import os
import socket
import zlib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final

import orjson

from shared import keys
from shared.contract import CONTRACT_VERSION, TASK_NAME, InferenceRequest, nested_deeper
from shared.errors import BadRequest, PayloadTooLarge, UndecodableMessage
from shared.headers import check_headers
from shared.json_values import is_unicode

HEADER = "muai"

LONGEST_CHARACTER = 4
"""Bytes of a character at the most."""

MAX_HEADER_BYTES = 64 * 1024
"""Most that a message may hold beside its body."""

ESCAPED = 3
"""How much longer a body can be inside an envelope: a quote becomes two bytes, a letter of two bytes six."""

MOST_INFLATED = 16 * 1024 * 1024
"""Bytes of a compressed message that is refused, up to which it is unpacked for whoever waits on what follows it."""

MAX_HEADER_DEPTH = 16
SHORT_BYTES = 8192
LONGEST_ID = 128
LONGEST_ERROR = 4096
"""Characters of an error's text that are kept."""

Sign = Callable[[Mapping[str, Any], str], dict[str, Any]]
"""Makes our own header with a signature in it, of a message's headers and body."""

_EMBED: Final = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
_SAME_HEADERS: Final[Mapping[str, Any]] = {
    "lang": "py",
    "task": TASK_NAME,
    "shadow": None,
    "eta": None,
    "expires": None,
    "group": None,
    "group_index": None,
    "retries": 0,
    "timelimit": (None, None),
    "parent_id": None,
    "argsrepr": "()",
    "origin": f"muai{os.getpid()}@{socket.gethostname()}",
    "ignore_result": False,
    "replaced_task_nesting": 0,
    "stamped_headers": None,
    "stamps": {},
}
"""The headers that all of our messages have alike."""

# What stands between the body, the headers and the properties that differ: the same in all messages, so written once.
_BODY: Final = b'{"content-encoding":"utf-8","content-type":"application/json","body":'
_HEADERS: Final = b',"headers":' + orjson.dumps(_SAME_HEADERS)[:-1] + b","
_PROPERTIES: Final = (
    b',"properties":' + orjson.dumps({"reply_to": "", "delivery_mode": 2, "body_encoding": None})[:-1] + b","
)
_END: Final = b"}"


def encode_request(
    request: InferenceRequest,
    queue: str,
    *,
    sent: float,
    content: str = "",
    reply: str | None = None,
    max_bytes: int | None = None,
    sign: Sign | None = None,
    headers: Mapping[str, str] | None = None,
) -> bytes:
    """One request as a message for ``queue``.

    Neither ``argsrepr`` nor ``kwargsrepr`` shows the inputs: those headers end up in events and logs. ``headers`` are
    further ones, which travel with the message. ``sign`` puts a signature into our own header. Raises
    :class:`PayloadTooLarge` above ``max_bytes``, and :class:`BadRequest` for a request or headers that a message cannot
    hold.
    """
    if headers:
        check_headers(headers)
    header: dict[str, Any] = {"v": CONTRACT_VERSION, "sent": sent}
    if content:
        header["content"] = content
    if reply is not None:
        header["reply"] = reply
    try:
        fields = request.given()
        fields["id"] = request.id  # which its maker may have left to us
        body = orjson.dumps(((), {"request": fields}, _EMBED))
    except (TypeError, ValueError) as error:  # one that was made past its validation
        raise BadRequest(f"the request cannot be written as JSON ({type(error).__name__})") from None
    check_size(len(body), max_bytes)
    task_id, text = request.id, body.decode()
    own_headers: dict[str, Any] = {
        "id": task_id,
        "root_id": task_id,
        "kwargsrepr": f"{{'request': <{request.kind} {request.model}>}}",
        HEADER: header,
    }
    if headers:
        own_headers |= headers
    if sign is not None:
        own_headers[HEADER] = sign({**_SAME_HEADERS, **own_headers}, text)
    properties = {
        "correlation_id": task_id,
        "delivery_info": {"exchange": "", "routing_key": queue},
        "priority": request.priority.wire,
        "delivery_tag": task_id,
    }
    return b"".join(
        (
            _BODY, orjson.dumps(text),
            _HEADERS, orjson.dumps(own_headers)[1:],
            _PROPERTIES, orjson.dumps(properties)[1:],
            _END,
        )
    )  # fmt: skip


def check_size(size: int, most: int | None) -> None:
    """Raise :class:`PayloadTooLarge` for a request of ``size`` bytes where that is above ``most``."""
    if most is not None and size > most:
        raise PayloadTooLarge(f"the request is {size} bytes; at most {most} are accepted (fleet.max_payload_bytes)")


def check_body(body: str, most: int) -> None:
    """The same for a body of text, which is counted only where it may be too large."""
    if LONGEST_CHARACTER * len(body) > most:
        check_size(len(body.encode()), most)


def dumps(value: Any) -> bytes:
    """JSON, compact."""
    return orjson.dumps(value)


def loads_object(payload: bytes | str) -> dict[str, Any]:
    """A JSON object; raise :class:`UndecodableMessage` where it is anything else."""
    try:
        value = orjson.loads(payload)
    except orjson.JSONDecodeError as error:
        try:
            value = _cleaned(json.loads(payload))
        except (ValueError, RecursionError):
            raise UndecodableMessage(f"the message is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UndecodableMessage("the message is not a JSON object")
    return value


def loads(text: bytes | str) -> Any:
    """The value of a JSON text, also of one in which Python's own writer has put half a character.

    It comes out as it went in: whoever reads on finds it wrong, and can say where. Raises :class:`BadRequest` for
    numbers that JSON does not have, and :class:`orjson.JSONDecodeError` for what is no JSON at all.
    """
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        found: list[str] = []
        try:
            value = json.loads(text, parse_constant=found.append)
        except (ValueError, RecursionError):
            raise error from None
    if found:
        raise BadRequest(f"the message's body holds {found[0]}, which JSON does not have")
    return value


def _cleaned(value: Any) -> Any:
    """The same with what cannot be written again as JSON writes it: half a character as its escape.

    So a body that stands in its envelope as text means what it meant. What is no finite number is nothing.
    """
    if isinstance(value, str):
        return value if is_unicode(value) else value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_cleaned(key): _cleaned(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_cleaned(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def decode_envelope(payload: bytes, max_bytes: int | None = None) -> dict[str, Any]:
    """The envelope of a message, its body as text; raise :class:`UndecodableMessage` where it is not one.

    Raises :class:`BadRequest` where it has an id or a task that can stand neither in a log nor in our own keys.

    Nothing is decompressed and nothing but JSON is read. What a sender says of its arguments for logs and events (up
    to 1,024 characters of them) is taken out. With ``max_bytes``, the most that a body may be, a message that must be
    larger is refused unread with :class:`PayloadTooLarge`.
    """
    if max_bytes is not None and len(payload) > ESCAPED * max_bytes + MAX_HEADER_BYTES:
        check_size(len(payload), max_bytes)
    envelope = loads_object(payload)
    headers, properties = envelope.get("headers"), envelope.get("properties")
    if not isinstance(properties, dict) or not isinstance(headers, dict):
        raise UndecodableMessage("the message has no headers or no properties: it was not written by Celery")
    if envelope.get("content-type") != "application/json":
        raise UndecodableMessage(
            f"the message's content type is {_shown(envelope.get('content-type'))}; only application/json is accepted"
        )
    if headers.get("compression"):
        raise UndecodableMessage("the message is compressed; compressed messages are not accepted")
    for name in ("id", "task"):
        value = headers.get(name)
        if value and value != TASK_NAME and not usable_id(value):
            raise BadRequest(f"the message's {name} is not a text of at most {LONGEST_ID} printable characters")
    # Nothing is nested deeper than there are brackets; to count those of a long message would take longer.
    flat = len(payload) <= SHORT_BYTES and payload.count(b"{") + payload.count(b"[") <= MAX_HEADER_DEPTH
    if not flat and nested_deeper([headers, properties], MAX_HEADER_DEPTH):
        raise UndecodableMessage(f"the message's headers are nested more than {MAX_HEADER_DEPTH} deep")
    body = _body(envelope.get("body"), properties.get("body_encoding"))
    if len(payload) > MAX_HEADER_BYTES and len(payload) > ESCAPED * len(body.encode()) + MAX_HEADER_BYTES:
        raise UndecodableMessage(f"the message's headers are more than {MAX_HEADER_BYTES} bytes")
    if "argsrepr" in headers:
        headers["argsrepr"] = "()"
    if "kwargsrepr" in headers:
        headers["kwargsrepr"] = "{}"
    envelope["body"], properties["body_encoding"] = body, None
    return envelope


def usable_id(value: object) -> str:
    """An id that may be part of a key and stand in a log; empty where ``value`` is none."""
    return value if isinstance(value, str) and len(value) <= LONGEST_ID and value.isprintable() else ""


def address_of(value: object) -> str:
    """The id under which a sender looks for its answer, whatever it looks like; empty where ``value`` is none."""
    return value if isinstance(value, str) and len(value) <= MAX_HEADER_BYTES and is_unicode(value) else ""


def _body(body: object, encoding: object) -> str:
    if not isinstance(body, str):
        raise UndecodableMessage("the message's body is not text")
    if not encoding:
        return body
    if encoding != "base64":
        raise UndecodableMessage(f"the message's body encoding is {_shown(encoding)}; only base64 is known")
    try:
        return binascii.a2b_base64(body, strict_mode=True).decode()
    except ValueError:
        raise UndecodableMessage("the message's body is not base64 of UTF-8 text") from None


_INFLATE: Mapping[str, Callable[[], Any]] = {
    "application/x-gzip": zlib.decompressobj,
    "application/x-bz2": bz2.BZ2Decompressor,
    "application/x-lzma": partial(lzma.LZMADecompressor, memlimit=MOST_INFLATED),
}
"""By the names that kombu has for them."""


def salvaged_body(message: Mapping[str, Any]) -> str:
    """The body of a message that is refused, as far as it can be read without harm; empty where it cannot.

    It is read for the sake of those who wait on what was to follow the request. Of what is compressed, no more than
    :data:`MOST_INFLATED` bytes are unpacked.
    """
    headers, properties, body = message.get("headers"), message.get("properties"), message.get("body")
    compression = headers.get("compression") if isinstance(headers, dict) else None
    encoding = properties.get("body_encoding") if isinstance(properties, dict) else None
    try:
        if not compression or not isinstance(body, str):
            return _body(body, encoding)
        inflate = _INFLATE[str(compression)]()
        return str(inflate.decompress(binascii.a2b_base64(body), MOST_INFLATED).decode())
    except (UndecodableMessage, KeyError, ValueError, zlib.error, lzma.LZMAError, OSError, EOFError):
        return ""


def _shown(value: object) -> str:
    return repr(value)[:80] if isinstance(value, str | None) else f"a {type(value).__name__}"


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


def reply_of(own: Mapping[str, Any]) -> str:
    """The reply stream that our own header names; empty where it names none, or a key that is not for replies."""
    reply = own.get("reply")
    if isinstance(reply, str) and reply.startswith(keys.REPLY_PREFIX) and len(reply) <= keys.LONGEST_KEY:
        return reply
    return ""


def success_meta(
    task_id: str,
    result: bytes,
    *,
    content: str = "",
    extra: Mapping[str, Any] | None = None,
    children: Sequence[Any] = (),
) -> bytes:
    """Celery's result record of a success that happened now. ``result`` is JSON.

    It begins with the digest of what was asked, where that is known: what comes under its id again is compared with it.
    """
    return orjson.dumps(
        {
            **({"content": content} if content else {}),
            "status": "SUCCESS",
            "result": orjson.Fragment(result),
            "traceback": None,
            "children": children,
            "date_done": datetime.now(UTC),
            "task_id": task_id,
            **(extra or {}),
        }
    )


def failure_meta(
    task_id: str,
    error: BaseException,
    *,
    status: str = "FAILURE",
    content: str = "",
    extra: Mapping[str, Any] | None = None,
) -> bytes:
    """Celery's result record of a failure, a retry or a revocation now, as its JSON serializer writes exceptions."""
    return orjson.dumps(
        {
            **({"content": content} if content else {}),
            "status": status,
            "result": {
                "exc_type": type(error).__name__,
                "exc_message": [str(error)[:LONGEST_ERROR]],
                "exc_module": type(error).__module__,
            },
            "traceback": None,
            "children": [],
            "date_done": datetime.now(UTC),
            "task_id": task_id,
            **(extra or {}),
        }
    )
