"""Lists of requests that nobody reads: what their senders call the queues is not what the fleet does.

A Celery sender with a ``global_keyprefix``, or with another ``sep`` or ``priority_steps`` among its transport options,
pushes onto lists of its own, and so does one that names a queue which no engine has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import redis

from shared import keys
from shared.contract import TASK_NAME, EngineName

SCAN_COUNT = 2000
"""Keys that the broker looks at in one step: less than a millisecond."""

_OF_A_REQUEST = re.compile(rb'"task": ?"' + re.escape(TASK_NAME.encode()) + rb'"')


@dataclass(frozen=True, slots=True)
class Stray:
    """A list that holds requests and that no worker reads: its name, printable, how many, and what is wrong."""

    name: str
    messages: int
    reason: str


def stray_lists(client: redis.Redis, most_keys: int) -> Iterator[Stray]:
    """The lists that nobody reads, among the first ``most_keys`` keys or so that the broker has.

    Raises what the client library raises: :class:`redis.exceptions.NoPermissionError` where the user may not look.
    """
    cursor, seen = 0, 0
    while seen < most_keys:
        cursor, found = client.scan(cursor, count=SCAN_COUNT, _type="list")
        for raw in found:
            name = raw.decode(errors="backslashreplace")
            if not is_read(name) and (messages := _requests(client, raw)):
                yield Stray(name.encode("unicode_escape").decode(), messages, reason_of(name))
        seen += SCAN_COUNT
        if cursor == 0:
            return


def is_read(name: str) -> bool:
    """Whether workers of the fleet read this list, or it is one of our own."""
    return name in _read_lists() or name.startswith("muai:")


def _read_lists() -> frozenset[str]:
    queues = (*map(keys.queue_of, EngineName), keys.CONTROL_QUEUE)
    return frozenset(name for queue in queues for name in keys.lists_of(queue))


def _requests(client: redis.Redis, name: bytes) -> int:
    """How long a list is whose first or last message is a request; 0 for another."""
    with client.pipeline(transaction=False) as pipe:
        pipe.llen(name)
        pipe.lindex(name, 0)
        pipe.lindex(name, -1)
        length, *ends = pipe.execute()
    return int(length) if any(end and _OF_A_REQUEST.search(end) for end in ends) else 0


def reason_of(name: str) -> str:
    """What its sender does that the fleet does not."""
    for queue in map(keys.queue_of, EngineName):
        for known in (*reversed(keys.lists_of(queue)),):
            if name.endswith(known):
                return f"its sender has a global_keyprefix ({name.removesuffix(known)!r}); the fleet has none"
    for queue in map(keys.queue_of, EngineName):
        apart: Any = re.fullmatch(rf"(.*){queue}(\D*)(\d+)", name, re.DOTALL)
        if apart:
            prefix = f", and a global_keyprefix ({apart[1]!r})" if apart[1] else ""
            if apart[2] == keys.PRIORITY_SEPARATOR:
                return f"its sender has other priority_steps (one is {apart[3]}){prefix}; the fleet has 0, 3, 6 and 9"
            return f"its sender has another sep for priorities ({apart[2]!r}){prefix}; the fleet has kombu's own"
    return "no engine has a queue of this name"
