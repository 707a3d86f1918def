"""A broker that came back without its last writes, as after a failover: what holders of before do harms nobody."""

from __future__ import annotations

import pytest
import redis

from shared import keys, wire
from shared.settings import FleetSettings
from workers.broker.delivery import RedisDelivery, Settlement, Written

FLEET = FleetSettings(lease_seconds=30.0)


@pytest.mark.parametrize("others", [False, True], ids=["the same worker", "another worker"])
def test_the_lease_of_before_does_not_end_one_of_after(redis_client: redis.Redis, others: bool) -> None:
    """A worker that still settles a lease which the broker has forgotten writes nothing, and frees nobody's message."""
    before = RedisDelivery(redis_client, FLEET)
    after = RedisDelivery(redis_client, FLEET) if others else before
    redis_client.lpush("fake", b"one")
    (old,) = before.claim("fake", 1).messages
    redis_client.flushdb()
    redis_client.lpush("fake", b"another")
    (new,) = after.claim("fake", 1).messages

    key = keys.result_key("one")
    written = before.settle([Settlement(old.lease, result_key=key, record=wire.success_meta("one", b"{}"))])

    assert written == [Written.LOST]
    assert redis_client.hkeys(keys.LEASE_MESSAGES) == [new.lease.encode()]
    assert after.settle([Settlement(new.lease)]) == [Written.DONE]


def test_what_a_sweep_took_over_has_a_lease_of_its_own(redis_client: redis.Redis) -> None:
    """The same for leases that a sweep has taken over."""
    short = RedisDelivery(redis_client, FleetSettings(lease_seconds=1.0))
    held = []
    for message in (b"one", b"another"):
        redis_client.flushdb()
        redis_client.lpush("fake", message)
        short.claim("fake", 1)
        (lapsed,) = redis_client.zrange(keys.LEASE_INDEX, 0, -1)
        redis_client.zadd(keys.LEASE_INDEX, {lapsed: 0})
        held += short.sweep()[1]

    first, second = held
    assert (first.payload, second.payload) == (b"one", b"another")
    assert short.settle([Settlement(first.lease), Settlement(second.lease)]) == [Written.LOST, Written.DONE]
