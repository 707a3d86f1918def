"""What is submitted again while it is under way is looked for, and pushed where it is nowhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import redis

from producer import Client
from shared import keys
from tests.support.fleet import FleetUnderTest
from tests.support.waiting import eventually
from workers.broker.delivery import RedisDelivery, Settlement
from workers.routing.doubts import PAGE, Doubts


def echo(request_id: str, prompt: str = "abc", **fields: object) -> dict[str, object]:
    """A request to the echo model under an id. With its deadline it is queued, whether there are workers or not."""
    return {"model": "echo", "inputs": {"prompt": prompt}, "id": request_id, "deadline": 4e9, **fields}


@pytest.fixture
def fleetless(make_fleet: Callable[..., FleetUnderTest]) -> Client:
    """A client of a fleet without workers."""
    return make_fleet().client


def settle_doubts(client: redis.Redis) -> None:
    """Look until nothing is doubted."""
    doubts = Doubts(client, "worker")

    def settled() -> bool:
        doubts.tend()
        return not client.exists(keys.DOUBTED)

    eventually(settled, 20, "the end of the doubts")


def waiting(client: redis.Redis) -> int:
    """Messages on all lists."""
    return sum(client.llen(name) for name in client.keys("*") if client.type(name) == b"list")


def test_a_request_whose_message_is_gone_is_answered_after_all(make_fleet, redis_client: redis.Redis) -> None:
    """A queue was purged by something that knows nothing of ids: submitted again, the request runs."""
    fleet: FleetUnderTest = make_fleet()
    fleet.client.submit(echo("purged"))
    redis_client.delete(*keys.lists_of("fake"))
    fleet.start_worker()

    assert fleet.client.submit(echo("purged")).result(20).text == "cba"
    assert redis_client.exists(keys.DOUBTED, keys.DOUBTING) == 0


@pytest.mark.parametrize("tenant", ["default", "acme"])
@pytest.mark.parametrize("place", ["deep in a list", "leased", "delayed", "nowhere"])
def test_only_what_is_nowhere_is_pushed(redis_client: redis.Redis, fleetless: Client, place: str, tenant: str) -> None:
    """On a list however deep, in a worker's hands or delayed: there it is. Each of a call is judged by itself."""
    client, delivery = fleetless, RedisDelivery(redis_client, fleetless.settings.fleet)
    wanted = [echo("ünusual", tenant=tenant), echo("plain", tenant=tenant)]
    client.submit_many(wanted)
    claimed = delivery.claim("fake", 2).messages if place in ("leased", "delayed") else []
    for message in claimed:
        if place == "delayed":
            delivery.settle([Settlement(message.lease, due_ms=4 * 10**12)])
    if place == "nowhere":
        redis_client.delete(*[name for name in redis_client.keys("*") if redis_client.type(name) == b"list"])
    client.submit_many([echo(f"other-{number}", tenant=tenant) for number in range(2 * PAGE)])
    before = waiting(redis_client)

    client.submit_many([*wanted, echo("new", tenant=tenant)])
    assert waiting(redis_client) == before + 1
    settle_doubts(redis_client)

    assert waiting(redis_client) == before + 1 + (2 if place == "nowhere" else 0)


def test_what_has_ended_meanwhile_is_left_alone(redis_client: redis.Redis, fleetless: Client) -> None:
    client = fleetless
    client.submit_many([echo("one"), echo("two")])
    redis_client.delete(*keys.lists_of("fake"))
    client.submit_many([echo("one"), echo("two")])
    redis_client.zrem(keys.UNDER_WAY, "one")
    client.cancel("two")

    settle_doubts(redis_client)

    assert waiting(redis_client) == 0


def test_one_worker_looks_at_a_time(redis_client: redis.Redis, fleetless: Client) -> None:
    """Another leaves it alone, and takes over where the one that looked is gone."""
    fleetless.submit(echo("one"))
    redis_client.delete(*keys.lists_of("fake"))
    fleetless.submit(echo("one"))
    redis_client.set(keys.DOUBTING, "another")
    doubts, now = Doubts(redis_client, "worker", lambda: now[0]), [100.0]

    doubts.tend()
    assert waiting(redis_client) == 0
    redis_client.delete(keys.DOUBTING)
    now[0] += 2
    doubts.tend()

    assert waiting(redis_client) == 1
