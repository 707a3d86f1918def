"""What the settling script makes of odd leases, large records, and keys that hold what nobody of ours has written."""

from __future__ import annotations

import json

import pytest
import redis

from shared import keys, wire
from shared.errors import Cancelled, EngineError
from shared.settings import FleetSettings
from workers.broker.delivery import RedisDelivery, Settlement, Written

RECORD = b'{"status": "SUCCESS", "result": 1}'
TENANTS = ["acme", "a/b", "\u00fcml\u00e4ut \u4f60\u597d", 'a"b\\c', "%d%s", "x" * 500]
LEASES = ["1", *(f"1/{tenant}" for tenant in TENANTS), "eta:1", "", " "]


@pytest.fixture
def delivery(broker, redis_client) -> RedisDelivery:
    """The scripts over an empty broker."""
    return RedisDelivery(redis_client, FleetSettings(redis_url=broker.url))


def leased(client: redis.Redis, *leases: str, message: bytes = b"a message", name: str = "fake") -> None:
    """Leave messages as if they had been claimed under these leases."""
    for lease in leases:
        client.hset(keys.LEASE_MESSAGES, lease, name.encode() + b"\n" + message)
        client.zadd(keys.LEASE_INDEX, {lease: 2e12})
        if "/" in lease:
            client.hincrby(keys.IN_FLIGHT, lease.partition("/")[2], 1)


@pytest.mark.parametrize("lease", LEASES)
def test_a_lease_ends_once_whatever_its_name(lease: str, delivery: RedisDelivery, redis_client: redis.Redis) -> None:
    """Its message and its tenant's count go with it; what comes second finds it gone and writes nothing."""
    leased(redis_client, lease)
    settlement = Settlement(lease, keys.result_key("one"), RECORD)

    assert delivery.settle([settlement, settlement]) == [Written.DONE, Written.LOST]
    assert redis_client.keys() == [keys.result_key("one").encode()]


def test_what_a_request_leaves_ends_with_it(delivery: RedisDelivery, redis_client: redis.Redis) -> None:
    """It is under way no longer, with a record or without; a hop and a give-back leave it so."""
    for number in "1234":
        leased(redis_client, number)
        redis_client.zadd(keys.UNDER_WAY, {number: 1})
        redis_client.set(f"muai:running:{number}", number)

    delivery.settle([
        Settlement("1", keys.result_key("1"), RECORD, request_id="1"), Settlement("2", request_id="2"),
        Settlement("3", push_list="onnx", push_message=b"x", request_id="3"), Settlement.give_back("4"),
    ])  # fmt: skip

    assert redis_client.zrange(keys.UNDER_WAY, 0, -1) == [b"3", b"4"]
    assert sorted(redis_client.keys("muai:running:*")) == [b"muai:running:3", b"muai:running:4"]


def test_no_lease_and_many(delivery: RedisDelivery, redis_client: redis.Redis) -> None:
    """Nothing to settle is nothing; 256 at once end, each with its own record."""
    assert delivery.settle([]) == []
    names = [str(number) for number in range(256)]
    leased(redis_client, *names)

    found = delivery.settle([Settlement(n, keys.result_key(n), json.dumps({"id": n})) for n in names])

    assert found == [Written.DONE] * 256
    assert json.loads(redis_client.get(keys.result_key("200"))) == {"id": "200"}


def test_large_records_and_messages(delivery: RedisDelivery, redis_client: redis.Redis) -> None:
    """Ten megabytes of an answer reach the result and the reply; as much of a message reaches the next queue."""
    large = b'{"status": "SUCCESS", "result": "' + b"x" * 10_000_000 + b'"}'
    leased(redis_client, "1", "2", message=large)

    found = delivery.settle([
        Settlement("1", keys.result_key("one"), large, "muai:reply:me"), Settlement.give_back("2")
    ])  # fmt: skip

    assert found == [Written.DONE, Written.DONE]
    assert redis_client.get(keys.result_key("one")) == large
    assert redis_client.xrange("muai:reply:me")[0][1] == {b"m": large}
    assert redis_client.lrange("fake", 0, -1) == [large]


def test_an_answer_that_is_only_for_its_reply_stream(delivery: RedisDelivery, redis_client: redis.Redis) -> None:
    """With ``ignore_result`` nothing is stored; who waits on the stream has it, where there is one."""
    leased(redis_client, "1", "2")

    delivery.settle([Settlement("1", "", RECORD, "muai:reply:me"), Settlement("2", "", RECORD)])

    assert [fields for _, fields in redis_client.xrange("muai:reply:me")] == [{b"m": RECORD}]
    assert redis_client.keys() == [b"muai:reply:me"]


@pytest.mark.parametrize("stored", [b"5", b"null", b"true", b'"text"', b"{", b"", b"\xff", b'{"status": 7}', None])
def test_what_is_no_record_does_not_stand(
    stored: bytes | None, delivery: RedisDelivery, redis_client: redis.Redis
) -> None:
    """Whatever lies under the result's key, the answer is written, and so is that of the request beside it."""
    odd, other = keys.result_key("odd"), keys.result_key("other")
    if stored is None:
        redis_client.lpush(odd, "a list")
    else:
        redis_client.set(odd, stored)
    leased(redis_client, "1", "2")

    found = delivery.settle([Settlement("1", odd, RECORD), Settlement("2", other, RECORD)])

    assert found == [Written.DONE, Written.DONE]
    assert redis_client.mget(odd, other) == [RECORD, RECORD]


def test_a_reply_key_that_is_no_stream_keeps_nobody_else_waiting(delivery, redis_client: redis.Redis) -> None:
    """The result is written all the same, and the requests beside it end."""
    redis_client.set("muai:reply:odd", "text")
    leased(redis_client, "1", "2")

    delivery.settle([
        Settlement("1", keys.result_key("one"), RECORD, "muai:reply:odd"), Settlement("2"),
    ])  # fmt: skip

    assert redis_client.get(keys.result_key("one")) == RECORD
    assert redis_client.zcard(keys.LEASE_INDEX) == 0


def test_a_cancelled_request_that_hops_is_ended_where_it_arrives(delivery, redis_client: redis.Redis) -> None:
    """Its message goes on, for what was to follow it is to be told by whoever holds it; its record stands."""
    revoked = wire.failure_meta("one", Cancelled(), status="REVOKED")
    redis_client.set(keys.result_key("one"), revoked)
    leased(redis_client, "1")
    retry = wire.failure_meta("one", EngineError(), status="RETRY")

    found = delivery.settle([Settlement("1", keys.result_key("one"), retry, "", "onnx", b"on", True)])

    assert found == [Written.DONE]
    assert redis_client.get(keys.result_key("one")) == revoked
    assert redis_client.lrange("onnx", 0, -1) == [b"on"]


def test_a_delayed_request_comes_back_when_it_is_cancelled(delivery, make_fleet, redis_client: redis.Redis) -> None:
    """Nobody waits out its time: at the next sweep its message is in its queue, once."""
    leased(redis_client, "1", message=b"later")
    delivery.settle([Settlement("1", due_ms=int(4e12), request_id="one")])
    assert delivery.sweep()[1] == []
    assert redis_client.lrange("fake", 0, -1) == []

    assert make_fleet().client.cancel("one")
    delivery.sweep()

    assert redis_client.lrange("fake", 0, -1) == [b"later"]
    assert redis_client.hlen(keys.DELAYED) == redis_client.zcard(keys.LEASE_INDEX) == 0


def test_who_waits_for_a_list_hears_of_what_its_own_worker_puts_there(
    delivery: RedisDelivery, redis_client: redis.Redis
) -> None:
    """The broker does not tell the connection that did it, and no longer tells it of what others do."""

    class Listener:
        def __init__(self) -> None:
            self.news: list[object] = []

        def changed(self, names: object) -> None:
            self.news.append(names)

        def freed(self) -> None:
            self.news.append("freed")

    listener, claims = Listener(), []
    delivery.scripts.tell(listener)
    delivery.claim_soon("fake", 1, claims.append, lambda: None)
    leased(redis_client, "1")
    assert [claim.waiting for claim in claims] == [False]

    delivery.settle_soon([Settlement.give_back("1")], lambda _: None, lambda: None)

    leased(redis_client, "2/acme")
    delivery.settle_soon([Settlement("2/acme")], lambda _: None, lambda: None)

    assert listener.news == [None, "freed"]
    delivery.scripts.close()
