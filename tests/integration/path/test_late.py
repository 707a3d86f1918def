"""Whoever waits for a request is told within a second of its deadline, wherever the request is."""

from __future__ import annotations

import time
from typing import Any

import pytest
import redis

from shared import keys
from shared.errors import DeadlineExceeded, QueueFull
from tests.support.fleet import FleetUnderTest
from tests.support.requests import ECHO, bare_app
from tests.support.waiting import eventually

LONG = {"fake": {"latency_ms": 20_000}, "batcher": {"max_batch_size": 1}}
AT_ONCE = {"monitoring": {"server": {"graceful_shutdown_timeout": 0}}}


@pytest.fixture
def busy(make_fleet: Any, redis_client: redis.Redis) -> FleetUnderTest:
    """A fleet whose only worker runs something for much longer than a test lasts."""
    fleet: FleetUnderTest = make_fleet(optimization=LONG, fleet={"queue_capacity": 10}, **AT_ONCE)
    fleet.start_worker()
    fleet.client.submit({**ECHO, "id": "long"})
    eventually(lambda: fleet.client.fleet()[0].in_flight == 1, what="the long run")
    return fleet


def told_after(handle: Any) -> float:
    """Seconds after its deadline at which whoever waits is told."""
    with pytest.raises(DeadlineExceeded, match="deadline passed"):
        handle.result(15)
    return time.time() - handle.deadline


def test_what_waits_in_its_queue_is_told_and_makes_room(busy: FleetUnderTest, redis_client: redis.Redis) -> None:
    """The worker that could claim it is busy; tenants' lanes and priorities alike."""
    client, urgency = busy.client, ("high", "low")
    handles = client.submit_many([{**ECHO, "tenant": f"t{number}"} for number in range(3)], timeout=1)
    handles += client.submit_many([{**ECHO, "priority": urgency[number % 2]} for number in range(7)], timeout=1)
    with pytest.raises(QueueFull):
        client.submit(ECHO)

    assert max(told_after(handle) for handle in handles) < 4
    assert redis_client.zcard(keys.DEADLINES) == 0
    assert client.queue_lengths()["fake"] == 0
    client.submit_many([ECHO] * 10, timeout=60)


def test_a_bare_sender_is_told(busy: FleetUnderTest) -> None:
    """Celery's ``expires``, and a deadline in a request that only its sender knows."""
    app = bare_app(busy.url)
    expiring = app.send_task("muai.infer", kwargs={"request": ECHO}, queue="fake", expires=2)
    late = app.send_task("muai.infer", kwargs={"request": {**ECHO, "deadline": time.time() + 2}}, queue="fake")
    patient = app.send_task("muai.infer", kwargs={"request": ECHO}, queue="fake")

    eventually(lambda: (expiring.state, late.state) == ("REVOKED", "FAILURE"), 12, "their ends")
    assert patient.state == "PENDING"
    assert busy.client.queue_lengths()["fake"] == 1


def test_any_worker_tells(make_fleet: Any, redis_client: redis.Redis) -> None:
    """One that serves no engine, of a request in the queue of an engine that has no worker yet."""
    fleet = make_fleet(fleet={"rescue_after_seconds": 600})
    fleet.start_worker("control")
    handle = fleet.client.submit(ECHO, timeout=1)

    assert told_after(handle) < 4
    assert redis_client.hlen(keys.LEASE_MESSAGES) == 0
