"""A broker in memory and a real one, seen in the same way: what one contract suite runs over."""

from __future__ import annotations

from typing import Any

import redis

from producer.client.submitter import SCRIPT_KEYS
from shared import keys, wire
from shared.broker import lua
from shared.errors import Cancelled, IdConflict
from shared.limits import LimitsInForce
from shared.settings import FleetSettings
from tests.support.clock import ManualClock
from workers.broker.delivery import RedisDelivery
from workers.broker.memory import MemoryDelivery
from workers.broker.memory_broker import LEASES_OF, MemoryBroker

CLOCK = "test:clock"

State = dict[str, Any]
"""What a broker holds: lists, leases, records, replies, dead letters and what is remembered of requests."""


def cancelled_record(request_id: str) -> bytes:
    """What a caller writes who cancels."""
    return wire.failure_meta(request_id, Cancelled(), status="REVOKED")


def set_clock(client: redis.Redis, clock: ManualClock) -> None:
    """Let the scripts of :class:`ClockedRedis` go by this clock, as it is now."""
    seconds, micros = divmod(round(clock() * 1_000_000), 1_000_000)
    client.set(CLOCK, f'["{seconds}", "{micros}"]')


class MemorySide:
    """The broker in memory."""

    def __init__(self, clock: ManualClock, fleet: FleetSettings, limits: LimitsInForce) -> None:
        self._broker = MemoryBroker(clock)
        self.delivery = MemoryDelivery(self._broker, fleet, limits)

    def submit(
        self, list_name: str, request_id: str, message: bytes, content: str = "", deadline: float | None = None
    ) -> bool:
        return self._broker.submit(list_name, request_id, message, content, deadline)

    def cancel(self, request_id: str, record: bytes) -> bool:
        return self._broker.cancel(request_id, record)

    def forget(self, request_id: str) -> None:
        del self._broker.records[keys.result_key(request_id)]

    def now_ms(self) -> int:
        """The broker's clock, in ms."""
        return self._broker.now

    def state(self) -> State:
        broker = self._broker
        return {
            "lists": broker.queues.waiting(),
            "leases": {name: (lease.list_name, lease.message, lease.expiry) for name, lease in broker.leases.items()},
            "records": broker.records,
            "replies": dict(broker.replies),
            "dead": [(letter.list_name, letter.reason, letter.message) for letter in broker.dead],
            "cancelled": broker.cancelled,
            "under way": broker.under_way,
            "contents": broker.contents,
            "deadlines": broker.deadlines,
            "in flight": {tenant: count for tenant, count in broker.queues.in_flight.items() if count},
        }


class ClockedRedis(redis.Redis):
    """A client whose scripts read the time from a key."""

    def register_script(self, script: str) -> Any:
        return super().register_script(
            script.replace("redis.call('TIME')", f"cjson.decode(redis.call('GET', '{CLOCK}'))")
        )


class RedisSide:
    """A real broker, whose scripts go by the test's clock."""

    def __init__(self, url: str, clock: ManualClock, fleet: FleetSettings, limits: LimitsInForce) -> None:
        self._client = ClockedRedis.from_url(url, protocol=2)
        self._client.flushall()
        self._clock = clock
        self._submit = self._client.register_script(lua("shared", "submit"))
        self._cancel = self._client.register_script(lua("shared", "cancel"))
        self._fleet = fleet
        self._delivery = RedisDelivery(self._client, fleet, limits, token=lambda: LEASES_OF)

    @property
    def delivery(self) -> RedisDelivery:
        """The delivery, with the broker's clock set."""
        self._set_clock()
        return self._delivery

    def close(self) -> None:
        self._client.close()

    def submit(
        self, list_name: str, request_id: str, message: bytes, content: str = "", deadline: float | None = None
    ) -> bool:
        self._set_clock()
        late = wire.dumps({request_id: deadline * 1000}) if deadline is not None else ""
        terms = [3600, 10_000, 2**30, late, 0, list_name, 0, 0, 1, request_id, content, message]
        answer = self._submit(keys=SCRIPT_KEYS, args=terms)
        if answer[0] == b"conflict":
            raise IdConflict
        return answer[1] == 1

    def cancel(self, request_id: str, record: bytes) -> bool:
        self._set_clock()
        return bool(self._cancel(keys=[keys.result_key(request_id), keys.CANCELLED], args=[record, 3600, 7200]))

    def _set_clock(self) -> None:
        set_clock(self._client, self._clock)

    def forget(self, request_id: str) -> None:
        self._client.delete(keys.result_key(request_id))

    def now_ms(self) -> int:
        """The broker's clock, in ms."""
        return round(self._clock() * 1000)

    def state(self) -> State:
        client = self._client
        names = [name.decode() for name in client.keys("*")]
        lists = [name for name in names if name.startswith((*keys.lists_of("fake"), "onnx", keys.LANE_PREFIX))]
        records = [name for name in names if name.startswith(keys.result_key(""))]
        replies = [name for name in names if name.startswith(keys.REPLY_PREFIX)]
        pipe = client.pipeline(transaction=False)
        pipe.zrange(keys.LEASE_INDEX, 0, -1, withscores=True)
        pipe.hgetall(keys.LEASE_MESSAGES)
        pipe.xrange(keys.DEAD_LETTERS)
        pipe.zrange(keys.CANCELLED, 0, -1, withscores=True)
        pipe.zrange(keys.UNDER_WAY, 0, -1, withscores=True)
        pipe.hgetall(keys.CONTENTS)
        pipe.zrange(keys.DEADLINES, 0, -1, withscores=True)
        pipe.hgetall(keys.IN_FLIGHT)
        for name in lists:
            pipe.lrange(name, 0, -1)
        for name in records:
            pipe.get(name)
        for name in replies:
            pipe.xrange(name)
        index, messages, dead, cancelled, under_way, contents, deadlines, in_flight, *rest = pipe.execute()
        expiries = {lease.decode(): int(expiry) for lease, expiry in index}
        assert expiries.keys() == {lease.decode() for lease in messages}
        stored = {lease.decode(): value.split(b"\n", 1) for lease, value in messages.items()}
        return {
            "lists": {name: list(reversed(found)) for name, found in zip(lists, rest, strict=False)},
            "leases": {lease: (name.decode(), message, expiries[lease]) for lease, (name, message) in stored.items()},
            "records": dict(zip(records, rest[len(lists) :], strict=False)),
            "replies": {
                name: [fields[b"m"] for _, fields in found]
                for name, found in zip(replies, rest[len(lists) + len(records) :], strict=True)
            },
            "dead": [(fields[b"list"].decode(), fields[b"reason"].decode(), fields[b"message"]) for _, fields in dead],
            "cancelled": {name.decode(): int(when) for name, when in cancelled},
            "under way": {name.decode(): int(when) for name, when in under_way},
            "contents": {name.decode(): content.decode() for name, content in contents.items()},
            "deadlines": {name.decode(): when for name, when in deadlines},
            "in flight": {tenant.decode(): int(count) for tenant, count in in_flight.items()},
        }


Side = MemorySide | RedisSide
