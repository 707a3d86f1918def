"""What sweeps find in a real broker: when, in which order, and at what cost."""

from __future__ import annotations

from typing import Any

import redis

from shared import keys
from shared.settings import FleetSettings
from workers.broker.delivery import RedisDelivery

FLEET = FleetSettings()
LIST = keys.list_of("fake", 3)


def worker(client: redis.Redis, name: str = "w", **fleet: Any) -> RedisDelivery:
    """The delivery of a worker of this name."""
    return RedisDelivery(client, FleetSettings(**fleet), affinity=name)


def lapse(client: redis.Redis) -> None:
    """Let every lease expire now."""
    client.zadd(keys.LEASE_INDEX, dict.fromkeys(client.zrange(keys.LEASE_INDEX, 0, -1), 1), xx=True)


def test_one_worker_watches_what_is_due_next_and_anybody_takes_over_what_is(redis_client: redis.Redis) -> None:
    """Of many workers one is told when to come again; a lease that has expired waits for nobody in particular."""
    first, *others = [worker(redis_client, f"w{number}") for number in range(5)]
    redis_client.lpush(LIST, b"message")
    first.claim("fake", 1)

    told = [one.sweep()[0] for one in (first, *others, first)]
    assert [due is not None for due in told] == [True, False, False, False, False, True]
    lapse(redis_client)
    _, (swept,) = others[-1].sweep()
    assert swept.payload == b"message"


def test_every_second_somebody_sweeps(redis_client: redis.Redis) -> None:
    """With the settings as they are. A watch lasts for less than that, so a dead worker's is over when others look."""
    assert FLEET.sweep_seconds <= 1
    first, second = (
        worker(redis_client, "first", sweep_seconds=0.05),
        worker(redis_client, "second", sweep_seconds=0.05),
    )
    first.sweep()
    assert 0 < redis_client.pttl(keys.SWEEPING) <= 40
    redis_client.lpush(LIST, b"message")
    first.claim("fake", 1)

    while second.sweep()[0] is None:
        pass
    assert redis_client.get(keys.SWEEPING) == b"second"
