"""What a stock Celery event receiver, as Flower and celery-exporter have one, sees of requests."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery

from shared.errors import BadRequest
from tests.support.events import captured
from tests.support.fleet import FleetUnderTest
from tests.support.waiting import eventually

SENDER = ("hostname", "pid", "utcoffset")


def of_task(events: list[dict[str, Any]], request_id: str) -> list[dict[str, Any]]:
    return [event for event in events if event.get("uuid") == request_id]


def test_each_request_is_reported_as_any_task(fleet: FleetUnderTest) -> None:
    """Received, started, succeeded or failed, in this order, with the worker's name and nothing of the inputs."""
    with Celery(broker=fleet.url) as app, captured(app) as events:
        good = fleet.client.submit(model="echo", inputs={"prompt": "a secret"})
        bad = fleet.client.submit(model="echo", inputs={"prompt": "!bad secret"})
        good.result(20)
        with pytest.raises(BadRequest):
            bad.result(20)
        eventually(lambda: len(of_task(events, good.id)) == 3 and len(of_task(events, bad.id)) == 3, what="six events")
        heartbeat = eventually(lambda: next((event for event in events if event["type"] == "worker-heartbeat"), None))

    succeeded, failed = of_task(events, good.id), of_task(events, bad.id)
    assert [event["type"] for event in succeeded] == ["task-received", "task-started", "task-succeeded"]
    assert [event["type"] for event in failed] == ["task-received", "task-started", "task-failed"]
    assert succeeded[0]["name"] == "muai.infer"
    assert succeeded[2]["runtime"] >= 0
    for event in succeeded + failed:
        assert [event[name] for name in SENDER] == [heartbeat[name] for name in SENDER]
        assert "secret" not in str(event)
    clocks = [event["clock"] for event in succeeded]
    assert clocks == sorted(set(clocks))


def test_events_are_switched_on_and_off_as_for_any_worker(make_fleet) -> None:
    """Where they are off, ``celery control enable_events`` holds for requests too, until ``disable_events``."""
    fleet = make_fleet(fleet={"send_events": False})
    fleet.start_worker()

    def submit() -> str:
        handle = fleet.client.submit(model="echo", inputs={"prompt": "hello"})
        handle.result(20)
        return str(handle.id)

    with Celery(broker=fleet.url) as app, captured(app) as events:
        before = submit()
        assert app.control.enable_events(reply=True, timeout=10, limit=1)
        during = submit()
        eventually(lambda: len(of_task(events, during)) == 3, what="three events")
        assert app.control.disable_events(reply=True, timeout=10, limit=1)
        after = submit()
        eventually(lambda: events[-1]["type"] == "worker-heartbeat", what="an event after it")

    assert of_task(events, before) == []
    assert of_task(events, after) == []
