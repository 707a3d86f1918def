"""Consumers that wait: who is woken by a message, and what it costs the broker."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
import redis
from kombu import Connection, Consumer, Queue

from shared import keys
from tests.benchmarks.broker_commands import commands_per_message
from tests.support.fleet import FleetUnderTest
from tests.support.requests import ECHO
from tests.support.waiting import eventually
from workers.celery import create_app


@contextmanager
def idle_consumers(fleet: FleetUnderTest, count: int) -> Iterator[list[str]]:
    """So many consumers of the queue ``plain`` that do nothing else; gives what they have taken."""
    app = create_app(fleet.settings)
    taken: list[str] = []
    ready: list[int] = []
    stopping = threading.Event()

    def consume(number: int) -> None:
        def take(message: object) -> None:
            message.ack()  # type: ignore[attr-defined]
            taken.append(message.payload["n"])  # type: ignore[attr-defined]

        with app.connection_for_read() as connection:
            consumer = Consumer(connection, [Queue("plain")], accept=["json"], on_message=take)
            consumer.consume()
            while not stopping.is_set():
                ready.append(number)
                try:
                    connection.drain_events(timeout=1)
                except TimeoutError:
                    continue

    with ExitStack() as stack:
        stack.callback(app.fleet.stopping.run)
        for number in range(count):
            thread = threading.Thread(target=consume, args=[number])
            thread.start()
            stack.callback(thread.join, 30)
        stack.callback(stopping.set)
        eventually(lambda: set(ready) == set(range(count)), 30, "the consumers")
        yield taken


@pytest.fixture
def publish(fleet: FleetUnderTest) -> Iterator[Callable[[str], None]]:
    """Publishes as a stock producer does."""
    with Connection(fleet.url) as stock:
        producer = stock.Producer(serializer="json")
        yield lambda name: producer.publish({"n": name}, routing_key="plain", exchange="")


def test_a_message_costs_little_more_where_eight_wait_for_it(
    fleet: FleetUnderTest, redis_client: redis.Redis, publish: Callable[[str], None]
) -> None:
    """All are told, and those that come too late only look."""
    costs = []
    for count in (1, 8):
        with idle_consumers(fleet, count) as taken:

            def one(taken: list[str] = taken) -> None:
                before = len(taken)
                publish("x")
                eventually(lambda: len(taken) > before, 10, "the message")

            one()
            costs.append(commands_per_message(redis_client, one, 100))
            time.sleep(0.1)
            assert len(taken) == 101

    # A request of ours costs its submission and its answer beside this: there it is at most 1.5 times.
    assert costs[1] < costs[0] + 7 * 2 + 1


def test_a_frozen_worker_holds_no_message_up(make_fleet, redis_client: redis.Redis) -> None:
    """Nobody is woken in place of another: those that run are told as well. What it is told counts when it runs on."""
    fleet = make_fleet(fleet={"lease_seconds": 60})
    frozen, _ = fleet.start_worker(), fleet.start_worker()
    fleet.client.submit(ECHO).result(10)
    frozen.send_signal(signal.SIGSTOP)
    try:
        for _ in range(5):
            assert fleet.client.submit(ECHO).result(10)
    finally:
        frozen.send_signal(signal.SIGCONT)

    fleet.processes[1].terminate()
    fleet.processes[1].wait(30)
    assert fleet.client.submit(ECHO).result(20)
    assert redis_client.zcard(keys.LEASE_INDEX) == 0


def test_while_one_worker_is_busy_another_takes_what_comes(make_fleet) -> None:
    """At once: it has waited all the while."""
    fleet = make_fleet(optimization={"fake": {"latency_ms": 3000}, "batcher": {"enabled": False}})
    for _ in range(2):
        fleet.start_worker()
    handles = [fleet.client.submit(ECHO) for _ in range(2)]

    results = [handle.result(20) for handle in handles]

    assert len({result.metadata["worker"] for result in results}) == 2


@pytest.mark.parametrize("terms", [{"priority": "low"}, {"priority": "high"}, {"tenant": "acme"}])
def test_whatever_list_a_message_comes_on_wakes_an_idle_worker(fleet: FleetUnderTest, terms: dict[str, str]) -> None:
    """Priorities and tenants, each time anew: the broker tells of a change once."""
    for _ in range(3):
        assert fleet.client.submit({**ECHO, **terms}).result(10)
        time.sleep(0.05)  # the worker goes back to sleep
