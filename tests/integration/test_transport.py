"""The transport as kombu and Celery's own tools use it."""

from __future__ import annotations

import redis
from kombu import Connection, Consumer, Queue

from shared import keys
from tests.conftest import FleetUnderTest, eventually
from tests.integration.test_submitting import ECHO
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

    (task,) = eventually(running, 10)

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
            eventually(lambda: connection.drain_events(timeout=5) or len(taken) == 4, 20)

    assert sorted(taken) == [0, 1, 1, 2]
    assert redis_client.zcard(keys.LEASE_INDEX) == 0
    ((_, letter),) = redis_client.xrange(keys.DEAD_LETTERS)
    assert letter[b"list"] == b"plain"


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
            eventually(lambda: connection.drain_events(timeout=5) or len(seen) == 5, 20)
        assert redis_client.zcard(keys.LEASE_INDEX) == 5

    assert redis_client.llen("open") == 5
    assert redis_client.zcard(keys.LEASE_INDEX) == 0
