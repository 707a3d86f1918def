"""What may be in the broker when all is over, and what of that is there for how long; all else was left behind."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping

import redis

from shared import keys

WITH_AN_END = ("celery-task-meta-*", "celery-taskset-meta-*", "muai:reply:*", "muai:rate:*")
"""Kept for a time: they have an expiry."""

KEPT = (
    "muai:workers:*", "muai:seal", keys.LEASE_COUNTER, "muai:queue:*", keys.CANCELLED,
    keys.DEAD_LETTERS, keys.IN_FLIGHT, "_kombu.binding*", "muai:released", "muai:sweeping",
    "muai:looked", "muai:doubting",
)  # fmt: skip
"""Of the fleet, and bounded in number."""

EMPTY = (keys.LEASE_INDEX, keys.LEASE_MESSAGES, keys.UNDER_WAY, keys.DELAYED, keys.CONTENTS)
"""What is under way: nothing."""

COUNTS = ("bytes", "laned")
"""Fields of a queue's state that are zero when nothing waits."""


def left_behind(client: redis.Redis) -> list[str]:
    """What ought not to be there, a line each."""
    found = []
    for key in sorted(key.decode(errors="replace") for key in client.scan_iter(count=1000)):
        if key in EMPTY:
            found.append(f"{key}: {_first(client, key)}")
        elif any(fnmatch.fnmatchcase(key, pattern) for pattern in WITH_AN_END):
            if client.ttl(key) == -1:
                found.append(f"{key} has no expiry")
        elif not any(fnmatch.fnmatchcase(key, pattern) for pattern in KEPT):
            found.append(f"{key}: {_first(client, key)}")
    in_flight = _counts(client, keys.IN_FLIGHT)
    found += [f"{keys.IN_FLIGHT}: {tenant} has {count:g}" for tenant, count in in_flight.items() if count]
    for key in client.scan_iter(match="muai:queue:*"):
        state = _counts(client, key.decode())
        found += [f"{key.decode()}: {name} is {state[name]}" for name in COUNTS if state.get(name)]
    return found


def _counts(client: redis.Redis, key: str) -> Mapping[str, float]:
    counts = {}
    for name, value in client.hgetall(key).items():
        try:
            counts[name.decode()] = float(value)
        except ValueError:
            continue
    return counts


def _first(client: redis.Redis, key: str) -> str:
    """The beginning of what a key holds."""
    read = {
        "list": lambda: (client.llen(key), client.lrange(key, -1, -1)),
        "zset": lambda: (client.zcard(key), client.zrange(key, 0, 2)),
        "hash": lambda: (client.hlen(key), client.hkeys(key)[:3]),
        "set": lambda: (client.scard(key), client.srandmember(key, 2)),
        "stream": lambda: (client.xlen(key), ()),
    }.get(client.type(key).decode(), lambda: (1, client.get(key)))
    count, some = read()
    return f"{count}, {str(some)[:160]}"
