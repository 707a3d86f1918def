"""Further headers of a message: what a sender may put beside Celery's headers and ours, such as a trace context.

They travel with the message as they are, over hops, retries and redeliveries. They say nothing of what is asked for, so
they are not signed: whoever handles the message may write them anew.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from shared.errors import BadRequest

MAX_FURTHER_BYTES: Final = 16 * 1024
"""Most that names and values of further headers may be together: a baggage of W3C's limit and a trace context fit."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_VALUE = re.compile(r"[\x20-\x7e]*")

OURS: Final = "muai"
"""Names that begin so are ours."""

CELERYS: Final = frozenset(
    {
        # what a task's message holds
        "argsrepr", "eta", "expires", "group", "group_index", "id", "ignore_result", "kwargsrepr", "lang", "origin",
        "parent_id", "replaced_task_nesting", "retries", "root_id", "shadow", "stamped_headers", "stamps", "task",
        "timelimit",
        # what a worker of Celery or kombu reads among the headers, or writes over them
        "args", "as_execution_options", "body_encoding", "called_directly", "callbacks", "chain", "children", "chord",
        "clear", "compression", "content-encoding", "content-type", "correlation_id", "delivery_info", "delivery_tag",
        "errbacks", "errors", "get", "headers", "hostname", "is_eager", "kwargs", "logfile", "loglevel", "properties",
        "redelivered", "reply_to", "soft_time_limit", "taskset", "time_limit", "update", "utc", "x-death",
    }
)  # fmt: skip


def further_headers(headers: Mapping[str, object]) -> dict[str, str]:
    """Those of a message's headers that are neither Celery's nor ours: what follows a request takes them over.

    What our client would refuse to send is left out; other senders may write names in capitals.
    """
    found: dict[str, str] = {}
    size = 0
    for name, value in headers.items():
        if name in CELERYS or not isinstance(value, str) or name.startswith(OURS):
            continue
        size += len(name) + len(value)
        if _NAME.fullmatch(name.lower()) and _VALUE.fullmatch(value) and size <= MAX_FURTHER_BYTES:
            found[name] = value
    return found


def check_headers(headers: Mapping[str, str]) -> None:
    """Raise :class:`BadRequest` for further headers that a message cannot have.

    A name is 1 to 64 of ``a-z 0-9 . _ -``, begins with a letter or a digit, and is neither Celery's nor ours; a value
    is printable ASCII text.
    """
    size = 0
    for name, value in headers.items():
        if not isinstance(name, str) or _NAME.fullmatch(name) is None:
            raise BadRequest(f"{str(name)[:64]!r} cannot be a message header: it is not 1 to 64 of a-z 0-9 . _ -")
        if name in CELERYS or name.startswith(OURS):
            whose = "Celery" if name in CELERYS else "this project"
            raise BadRequest(f"the message header {name!r} belongs to {whose}; choose another name")
        if not isinstance(value, str) or _VALUE.fullmatch(value) is None:
            raise BadRequest(f"the message header {name!r} is not printable ASCII text")
        size += len(name) + len(value)
    if size > MAX_FURTHER_BYTES:
        raise BadRequest(f"the message headers are {size} bytes; at most {MAX_FURTHER_BYTES} are accepted")
