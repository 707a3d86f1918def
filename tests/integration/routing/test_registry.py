"""The registry on a real broker."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
import redis

from shared import keys
from shared.embedded import EmbeddedBroker
from shared.errors import NoEngineAvailable
from shared.registry import Roster, WorkerInfo, WorkerRegistry
from shared.settings import FleetSettings
from tests.benchmarks.bench_registry import Announcers, worker_of
from tests.support.brokers import ClockedRedis, set_clock
from tests.support.clock import ManualClock
from tests.support.requests import ECHO
from tests.support.shell import muai_says
from tests.support.waiting import eventually

MOMENTS = 20
"""Tries to find the processor free: what others do on it at the time counts as the broker's."""


def test_a_silent_worker_disappears_within_ten_seconds(fleet) -> None:
    """A frozen worker is gone from the registry in at most 10 s, and a submit then says that none is there."""
    (worker,) = fleet.client.fleet()
    assert (worker.pid, worker.queues, worker.engines[0].name) == (fleet.processes[0].pid, ("fake",), "fake")
    os.kill(worker.pid, signal.SIGSTOP)
    ages: list[int] = []

    def gone() -> bool:
        found = fleet.client.fleet()
        ages.extend(silent.age_ms for silent in found)
        return not found

    eventually(gone, what="the worker's disappearance")

    assert max(ages) <= 10_000  # by the broker's clock, at which it was last there
    with pytest.raises(NoEngineAvailable):
        fleet.client.submit(ECHO)
    os.kill(worker.pid, signal.SIGCONT)
    eventually(lambda: fleet.client.fleet(), what="its return")


def test_a_worker_that_loads_is_waited_for(make_fleet) -> None:
    """It is announced from its start on: requests are taken, its queue is left to it, and it answers them all."""
    fleet = make_fleet(
        fleet={"rescue_after_seconds": 0.5, "heartbeat_seconds": 0.2},
        optimization={"fake": {"load_ms": 6000}},
        monitoring={"server": {"preload_models": ["echo"]}},
    )
    fleet.start_worker("control")
    worker = fleet.start_worker(wait=False)

    def announced() -> WorkerInfo | None:
        return next((info for info in fleet.client.fleet() if info.loading), None)

    info = eventually(announced, what="the announcement of a worker that loads")
    assert (info.pid, info.queues, info.ready, info.loading) == (worker.pid, ("fake",), False, {"fake": "echo"})
    assert "(starting)" in muai_says(fleet, "status")
    handles = fleet.client.submit_many([ECHO] * 10)
    eventually(lambda: time.time() - info.started > 5, what="the time after which a queue without workers is rescued")

    assert [handle.result(60).text for handle in handles] == ["olleh"] * 10
    assert not any("no live worker" in fleet.log(process) for process in fleet.processes)
    eventually(lambda: all(one.ready and not one.loading for one in fleet.client.fleet()), what="its being ready")


def test_a_worker_that_loads_leaves_at_once_when_it_is_stopped(make_fleet) -> None:
    """SIGTERM in the middle of its loading."""
    fleet = make_fleet(optimization={"fake": {"load_ms": 60_000}}, monitoring={"server": {"preload_models": ["echo"]}})
    worker = fleet.start_worker(wait=False)
    eventually(lambda: fleet.client.fleet(), what="its announcement")

    worker.terminate()

    assert worker.wait(20) == 0
    assert fleet.client.fleet() == []


def test_a_worker_that_stops_leaves_at_once(fleet) -> None:
    """After SIGTERM nothing is routed to it any longer, and its process ends well."""
    fleet.processes[0].terminate()

    assert fleet.processes[0].wait(20) == 0
    assert fleet.client.fleet() == []


class Registry:
    """A registry on a broker whose clock the test sets."""

    def __init__(self, url: str, clock: ManualClock) -> None:
        self.client = ClockedRedis.from_url(url, protocol=2)
        self.clock = clock
        self.registry = WorkerRegistry(self.client, 8.0)
        self.roster = Roster(self.registry)

    def announce(self, *numbers: int, in_flight: int = 0, **changes: object) -> None:
        self._tick()
        for number in numbers:
            self.registry.announce(worker_of(number, in_flight).model_copy(update=changes))

    def leave(self, number: int) -> None:
        self._tick()
        self.registry.leave(worker_of(number).id)

    def read(self) -> tuple[list[int], bool]:
        """Who lives, as far as the roster knows; and whether it read all of them."""
        self._tick()
        whole = self.registry.changes(self.roster._known.since).whole
        return [worker.pid for worker in self.roster.read()], whole

    def _tick(self) -> None:
        self.clock.advance(0.001)
        set_clock(self.client, self.clock)


@pytest.fixture
def registry(redis_client: redis.Redis, broker: EmbeddedBroker) -> Iterator[Registry]:
    """An empty one."""
    made = Registry(broker.url, ManualClock())
    yield made
    made.client.close()


def test_who_asks_again_is_told_what_has_changed(registry: Registry) -> None:
    """Who came, changed and left; what passes is no change."""
    registry.announce(1, 2, 3)
    assert registry.read() == ([1, 2, 3], True)
    registry.announce(1, 2, in_flight=7)
    registry.leave(3)
    registry.announce(4)
    changes = registry.registry.changes(registry.roster._known.since)
    assert (sorted(changes.workers), changes.gone) == ([worker_of(4).id], {worker_of(3).id})
    assert registry.read() == ([1, 2, 4], False)

    registry.announce(1, queues=("onnx",))
    assert registry.read()[1] is False
    assert registry.roster.read()[0].queues == ("onnx",)


def test_who_falls_silent_is_missed_at_once(registry: Registry) -> None:
    """By who only asks as well, and it counts again when it is back."""
    registry.announce(1, 2)
    registry.read()
    registry.clock.advance(5)
    registry.announce(1)
    registry.clock.advance(3.5)
    assert registry.read()[0] == [1]
    registry.announce(2)
    assert registry.read()[0] == [1, 2]
    registry.clock.advance(9)
    assert registry.read()[0] == []
    registry.announce(1)
    assert registry.read()[0] == [1]


def test_a_broker_that_was_emptied_or_has_another_clock_is_read_anew(registry: Registry) -> None:
    """Nothing that is known from before counts."""
    registry.announce(1, 2)
    registry.read()
    registry.client.flushdb()
    registry.announce(3)
    assert registry.read()[0] == [3]

    registry.clock.advance(-3600)
    registry.announce(3, queues=("onnx",))
    registry.read()
    assert registry.roster.read()[0].queues == ("onnx",)


def test_workers_that_keep_no_changes_are_seen(registry: Registry) -> None:
    """Those of 0.1.0: among themselves, and beside newer ones."""

    def old(number: int) -> None:
        registry._tick()
        registry.client.zadd(keys.WORKERS_SEEN, {worker_of(number).id: int(registry.clock() * 1000)})
        registry.client.hset(keys.WORKERS_INFO, worker_of(number).id, worker_of(number).model_dump_json())

    old(1)
    assert registry.read() == ([1], True)
    old(2)
    assert registry.read() == ([1, 2], True)
    registry.announce(3)
    assert registry.read()[0] == [1, 2, 3]
    registry.client.hdel(keys.WORKERS_INFO, worker_of(1).id)
    registry.client.zrem(keys.WORKERS_SEEN, worker_of(1).id)
    registry.clock.advance(1)
    registry.announce(3)
    assert registry.read() == ([2, 3], False)


def test_heartbeats_cost_the_broker_the_same_however_many_there_are(
    redis_client: redis.Redis, broker: EmbeddedBroker
) -> None:
    """Two hundred workers take less than 3 % of its time, at a moment at which others leave it the processor."""
    costs = {}
    for count in (20, 200):
        redis_client.flushall()
        announcers = Announcers(redis.Redis.from_url(broker.url, protocol=2), count)
        announcers.round(0)
        before = redis_client.info("stats")["total_commands_processed"]
        announcers.round(1)
        commands = redis_client.info("stats")["total_commands_processed"] - before
        costs[count] = commands / count, announcers

    assert costs[200][0] < costs[20][0] + 1
    least = 3 / 100 * FleetSettings().heartbeat_seconds / 200 * 1e6  # microseconds that each may take
    assert any(costs[200][1].micros() < least for _ in range(MOMENTS))
