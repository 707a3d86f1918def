"""What sweeps find in a real broker: when, in which order, and at what cost."""

from __future__ import annotations

from typing import Any

import redis

from shared import keys, wire
from shared.contract import InferenceRequest, Inputs
from shared.settings import FleetSettings
from workers.broker.delivery import Deadline, RedisDelivery, Settlement

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


def delay(client: redis.Redis, count: int, size: int = 200) -> None:
    """So many delayed messages of so many bytes, due at once, as of tasks with the same countdown."""
    with client.pipeline(transaction=False) as pipe:
        for number in range(1, count + 1):
            lease = f"{keys.DELAYED_PREFIX}{number}\nr{number}"
            pipe.hset(keys.LEASE_MESSAGES, lease, f"{LIST}\n{number}".ljust(size).encode())
            pipe.zadd(keys.LEASE_INDEX, {lease: 5})
        pipe.execute()


def order(client: redis.Redis) -> list[int]:
    """The numbers of the messages that wait, in the order in which they are claimed."""
    return [int(message.split()[0]) for message in reversed(client.lrange(LIST, 0, -1))]


def test_many_that_are_due_together_hold_nobody_up(redis_client: redis.Redis) -> None:
    """Thousands go back with each sweep, which says to come again at once; expired leases are first; order is kept."""
    sweeper = worker(redis_client)
    redis_client.lpush("pytorch", b"held")
    sweeper.claim("pytorch", 1)
    lapse(redis_client)
    delay(redis_client, 12_000)

    due, swept = sweeper.sweep()
    assert [one.payload for one in swept] == [b"held"]
    sweeps = 1
    while due == 0:
        due, _ = sweeper.sweep()
        sweeps += 1

    assert sweeps <= 4
    assert order(redis_client) == list(range(1, 12_001))


def test_large_messages_go_back_in_several_sweeps(redis_client: redis.Redis) -> None:
    """A script holds no more than some megabytes of them, and the order is kept all the same."""
    sweeper = worker(redis_client)
    delay(redis_client, 300, size=200_000)
    while sweeper.sweep()[0] == 0:
        pass

    assert order(redis_client) == list(range(1, 301))
    assert 0 < redis_client.ttl(keys.RELEASED) <= 600


def test_more_expired_leases_than_a_sweep_takes_keep_their_order(redis_client: redis.Redis) -> None:
    """Who sweeps puts the youngest back first, and those before them in front of these."""
    names = [b"%d" % number for number in range(2500)]
    redis_client.lpush(LIST, *names)
    sweeper = worker(redis_client)
    sweeper.claim("fake", len(names))
    lapse(redis_client)
    due = 0.0
    while due == 0:
        due, swept = sweeper.sweep()
        sweeper.settle([Settlement.give_back(one.lease) for one in reversed(swept)])

    assert order(redis_client) == list(range(2500))


# -- late requests ----------------------------------------------------------------------------------------------------


def request_of(number: int) -> bytes:
    """A message as our client writes it."""
    request = InferenceRequest(id=f"r{number}", model="echo", inputs=Inputs(prompt="x" * 500))
    return wire.encode_request(request, "fake", sent=1.0)


def test_what_is_late_is_found_wherever_it_is_on_a_long_list(redis_client: redis.Redis) -> None:
    """No script looks at more than a part of it; whoever watches comes again at once until all of it is found."""
    sweeper = worker(redis_client)
    redis_client.lpush(LIST, *map(request_of, range(9000)))
    late = [0, 1, 4500, 8998, 8999]
    sweeper.deadlines([Deadline(f"r{number}", LIST, 1.0) for number in late])
    found, again, scripts = [], 0.0, 0
    while again == 0:
        again, swept = sweeper.late()
        found += [one.payload for one in swept]
        scripts += 1
        redis_client.rpop(LIST)  # others claim and submit meanwhile
        redis_client.lpush(LIST, request_of(9000 + scripts))

    assert found == [request_of(number) for number in late]
    assert 4 <= scripts <= 8
    assert redis_client.exists(keys.DEADLINES) == 0


def foreign(number: int) -> bytes:
    """A message of another sender."""
    return b'{"body": "", "headers": {"id": "f%d"}, "properties": {"correlation_id": "f%d"}}' % (number, number)


def seen(sweeper: RedisDelivery) -> list[bytes]:
    """What a look finds, and those that follow it at once."""
    found, more = list[bytes](), True
    while more:
        more, messages = sweeper.unread()
        found += [message for _, message in messages]
    return found


def test_what_others_have_sent_is_looked_at_once(redis_client: redis.Redis) -> None:
    """The oldest first, in parts; what was claimed or was late meanwhile makes no other look at it again."""
    sweeper = worker(redis_client)
    redis_client.lpush(LIST, *map(foreign, range(700)), *map(request_of, range(2500)), foreign(700))
    assert seen(sweeper) == list(map(foreign, range(701)))
    redis_client.lpush(LIST, foreign(701), request_of(9999), foreign(702))
    redis_client.rpop(LIST, 100)
    assert seen(sweeper) == [foreign(701), foreign(702)]

    sweeper.deadlines([Deadline("f702", LIST, 1.0)])
    while not sweeper.late()[1]:
        pass
    redis_client.lpush(LIST, foreign(703))
    assert seen(sweeper) == [foreign(703)]
    redis_client.delete(LIST)
    redis_client.lpush(LIST, foreign(704))
    assert seen(sweeper) == [foreign(704)]
    redis_client.delete(LIST)
    assert seen(sweeper) == []
    assert redis_client.exists(keys.LOOKED) == 0
