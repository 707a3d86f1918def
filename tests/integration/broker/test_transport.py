"""The transport as kombu and Celery's own tools use it."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import redis
from kombu import Connection, Consumer, Queue
from kombu.asynchronous import Hub

from shared import keys
from shared.embedded import EmbeddedBroker
from tests.support.fleet import FleetUnderTest
from tests.support.requests import ECHO
from tests.support.waiting import eventually
from workers.celery import create_app


def test_remote_control_answers_and_leaves_nothing_leased(fleet: FleetUnderTest, redis_client: redis.Redis) -> None:
    """ping, stats, conf and active answer from a live worker; their replies leave no lease and no dead letter."""
    app = create_app(fleet.settings)
    assert fleet.client.submit(ECHO).result(10)

    for _ in range(3):
        inspect = app.control.inspect(timeout=2)
        assert list(inspect.ping().values()) == [{"ok": "pong"}]
    (stats,) = inspect.stats().values()
    (conf,) = inspect.conf().values()
    (active,) = inspect.active().values()

    assert stats["total"] == {"muai.infer": 1}
    assert conf["worker_pool"] == "solo"
    assert active == []
    assert redis_client.zcard(keys.LEASE_INDEX) == 0
    assert redis_client.xlen(keys.DEAD_LETTERS) == 0


def test_running_requests_are_seen_by_inspect(make_fleet) -> None:
    """``celery inspect active`` shows what runs, without its inputs."""
    fleet = make_fleet(optimization={"fake": {"latency_ms": 3000}})
    fleet.start_worker()
    app = create_app(fleet.settings)
    handle = fleet.client.submit(ECHO)

    def running() -> list[dict[str, object]]:
        answer = app.control.inspect(timeout=1).active() or {}
        return [task for tasks in answer.values() for task in tasks]

    (task,) = eventually(running)

    assert (task["id"], task["name"], task["args"]) == (handle.id, "muai.infer", [])
    assert "hello" not in str(task)
    assert handle.result(10)


def test_ordinary_kombu_consumers_acknowledge_reject_and_requeue(
    fleet: FleetUnderTest, redis_client: redis.Redis
) -> None:
    """Through a plain kombu connection: ack ends the lease, requeue brings the message back, reject keeps it aside."""
    app = create_app(fleet.settings)
    taken = []
    with app.connection_for_read() as connection:
        producer = connection.Producer(serializer="json")
        for number in range(3):
            producer.publish({"n": number}, routing_key="plain", exchange="")
        decide = {0: ["ack"], 1: ["requeue", "ack"], 2: ["reject"]}

        def take(body, message):
            taken.append(body["n"])
            getattr(message, decide[body["n"]].pop(0))()

        with Consumer(connection, [Queue("plain")], callbacks=[take], accept=["json"]):
            eventually(lambda: connection.drain_events(timeout=5) or len(taken) == 4)

    assert sorted(taken) == [0, 1, 1, 2]
    assert redis_client.zcard(keys.LEASE_INDEX) == 0
    ((_, letter),) = redis_client.xrange(keys.DEAD_LETTERS)
    assert letter[b"list"] == b"plain"


def test_asking_again_while_news_waits_to_be_read(make_fleet) -> None:
    """A loop that stood still for long finds its connection as it left it."""
    app = create_app(make_fleet().settings)
    with app.connection_for_read() as connection:
        channel = connection.default_channel
        taken = []
        consumer = Consumer(channel, [Queue("plain")], accept=["json"], on_message=taken.append)
        consumer.consume()
        assert channel.claim_all() is False
        connection.Producer(serializer="json").publish({}, routing_key="plain", exchange="")

        connection.transport.cycle.maybe_check_brpop_health()  # as from time to time

        connection.Producer(serializer="json").publish({}, routing_key="plain", exchange="")
        eventually(lambda: connection.drain_events(timeout=5) or len(taken) == 2)
        for message in taken:
            message.ack()
    app.fleet.stopping.run()


def test_an_acknowledgement_that_fails_lets_the_lease_lapse(tmp_path: Path, make_fleet) -> None:
    """What the broker did not take is not kept for ever: the message comes again once its lease has expired."""
    taken = []
    with EmbeddedBroker(tmp_path / "own") as own:
        fleet = make_fleet()
        fleet.url = own.url
        app = create_app(fleet.settings)
        with app.connection_for_read() as connection:
            connection.Producer(serializer="json").publish({}, routing_key="plain", exchange="")
            consumer = Consumer(connection, [Queue("plain")], accept=["json"], on_message=taken.append)
            consumer.consume()
            eventually(lambda: connection.drain_events(timeout=5) or taken)
            held = app.fleet.leases.table.read()
            own.kill()

            with pytest.raises(redis.ConnectionError):
                taken[0].ack()

            assert [lease for lease, _ in held] == [taken[0].delivery_tag]
            assert app.fleet.leases.table.read() == []
        app.fleet.stopping.run()


def test_what_a_consumer_leaves_open_goes_back(fleet: FleetUnderTest, redis_client: redis.Redis) -> None:
    """Messages that were delivered and not acknowledged return to their queue when the channel closes."""
    app = create_app(fleet.settings)
    with Connection(fleet.url) as stock:
        for number in range(5):
            stock.Producer(serializer="json").publish({"n": number}, routing_key="open", exchange="")
    seen = []

    with app.connection_for_read() as connection:
        with Consumer(
            connection, [Queue("open")], callbacks=[lambda body, message: seen.append(body)], accept=["json"]
        ):
            eventually(lambda: connection.drain_events(timeout=5) or len(seen) == 5)
        assert redis_client.zcard(keys.LEASE_INDEX) == 5

    assert redis_client.llen("open") == 5
    assert redis_client.zcard(keys.LEASE_INDEX) == 0


def test_a_connection_leaves_nothing_in_the_loop(fleet: FleetUnderTest) -> None:
    """After a reconnect the loop calls what belongs to the new connection only, and the old one can go."""
    app, hub = create_app(fleet.settings), Hub()
    gone = []
    try:
        for _ in range(3):
            with app.connection_for_read() as connection:
                connection.connect()
                connection.transport.register_with_event_loop(connection.connection, hub)
                gone.append(weakref.ref(connection.transport))
            hub.reset()
            hub.timer.clear()
        del connection
        gc.collect()

        assert len(hub.on_tick) == 1
        assert [reference() is None for reference in gone] == [True, True, False]
    finally:
        hub.close()
