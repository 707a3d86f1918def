"""How much waits on the engines' queues."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import redis

from shared import keys
from shared.contract import EngineName


def waiting(client: redis.Redis, queues: Sequence[str]) -> dict[str, int]:
    """Messages that wait on each of these queues, on its shared lists and in its tenants' lanes."""
    with client.pipeline(transaction=False) as pipe:
        for queue in queues:
            for name in keys.lists_of(queue):
                pipe.llen(name)
            pipe.hget(keys.queue_state(queue), "laned")
        counts = [int(count or 0) for count in pipe.execute()]
    each = len(keys.PRIORITY_STEPS) + 1
    return {queue: sum(counts[i * each : (i + 1) * each]) for i, queue in enumerate(queues)}


def lengths(client: redis.Redis) -> dict[str, int]:
    """Messages that wait on every queue; under ``dead`` the dead letters, under ``leased`` those in workers' hands."""
    queues = waiting(client, [*map(keys.queue_of, EngineName), keys.CONTROL_QUEUE])
    leased: Any = client.zcard(keys.LEASE_INDEX)
    dead: Any = client.xlen(keys.DEAD_LETTERS)
    return {**queues, "leased": leased, "dead": dead}
