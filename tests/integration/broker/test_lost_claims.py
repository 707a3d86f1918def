"""Claims whose answers a network loses: what they have leased goes back, and is not counted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis

from shared import keys
from shared.embedded import EmbeddedBroker
from shared.settings import FleetSettings
from tests.faults.proxy import Proxy
from tests.support.requests import ECHO
from workers.broker.delivery import RedisDelivery


@pytest.fixture
def proxy(broker: EmbeddedBroker) -> Iterator[Proxy]:
    """The network before the broker."""
    with Proxy(int(broker.url.rpartition(":")[2].partition("/")[0])) as made:
        yield made


def test_network_faults_are_no_deliveries(make_fleet, proxy: Proxy, redis_client: redis.Redis) -> None:
    """As many as the deliveries that a request has: it is answered soon after the last one, and by its first run."""
    fleet = make_fleet(fleet={"lease_seconds": 600, "max_deliveries": 3})
    worker = fleet.start_worker(environ={"REDIS_URL": proxy.url})
    proxy.lose(b"muai.infer", times=3)

    assert fleet.client.submit(ECHO).result(60).text == "olleh"

    assert proxy.to_lose == 0
    assert fleet.log(worker).count("1 messages were leased by claims whose answers were lost; they go back") == 3
    assert "expired leases" not in fleet.log(worker)
    assert redis_client.hlen(keys.LEASE_MESSAGES) == 0


def test_they_go_back_in_their_order_and_nothing_else_does(proxy: Proxy, redis_client: redis.Redis) -> None:
    """More than ten, so that the order of their numbers is not that of their names; what was claimed before is kept."""
    client = redis.Redis.from_url(proxy.url, retry=None)
    delivery = RedisDelivery(client, FleetSettings())
    messages = [b"message %d" % number for number in range(15)]
    redis_client.lpush("fake", *messages)
    kept = delivery.claim("fake", 2).messages
    proxy.lose(b"message", times=1)

    with pytest.raises(redis.ConnectionError):
        delivery.claim("fake", 12)
    assert redis_client.llen("fake") == 1
    delivery.give_back_lost()

    assert redis_client.lrange("fake", 0, -1)[::-1] == messages[2:]
    assert set(redis_client.zrange(keys.LEASE_INDEX, 0, -1)) == {one.lease.encode() for one in kept}
    client.close()
