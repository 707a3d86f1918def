"""Every request ends once for those who watch: as Flower, celery-exporter and instrumentation read it of any task."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest
import redis
from celery import Celery, chain, chord
from celery.utils import uuid

from tests.integration.ends.crew import BAD, QUICK, SLOW, cancel, fleet_on, infer, left_behind, revoke, undertaker
from tests.support.events import captured
from tests.support.fleet import FleetUnderTest
from tests.support.requests import bare_app
from tests.support.waiting import eventually

TERMINAL = {"task-succeeded", "task-failed", "task-revoked", "task-rejected"}
RAN = ["task-received", "task-started"]

STEPS = {
    "engine error": [*RAN, "task-failed"],
    "crash": [*RAN, "task-failed"],
    "refused by the engine": [*RAN, "task-failed"],
    "answer too large": [*RAN, "task-failed"],
    "refused at admission": ["task-received", "task-failed"],
    "unknown model": ["task-received", "task-failed"],
    "deadline": ["task-received", "task-failed"],
    "expired": ["task-received", "task-revoked"],
    "cancelled before": ["task-received", "task-revoked"],
    "revoked before": ["task-received", "task-revoked"],
    "revoked elsewhere": ["task-received", "task-revoked"],
    "cancelled while delayed": ["task-revoked"],
    "revoked while delayed": ["task-revoked"],
    "expired where nobody serves": ["task-revoked"],
    "cancelled where nobody serves": ["task-revoked"],
}
"""What is told of each; of those that are not named, that they failed, and nothing else."""

LATE = {"deadline", "expired"}


def send(fleet: FleetUnderTest, app: Celery) -> dict[str, str]:
    """Each end, alone and as a chord's member. Returns what each is called, by its id."""
    names = {}
    for name, bad in BAD.items():
        for place in ("alone", "in a chord"):
            request_id = uuid()
            names[request_id] = f"{name}, {place}"
            if bad.first is not None:
                bad.first(fleet, app, request_id)
            call = infer(app, **{"task_id": request_id, **bad.options})
            (call if place == "alone" else chord([infer(app), call], infer(app))).apply_async()
            if bad.then is not None:
                bad.then(fleet, app, request_id)
    names[chain(infer(app), infer(app, None)).apply_async().id] = "answered"
    return names


@pytest.fixture(scope="module")
def events(broker, tmp_path_factory) -> Iterator[dict[str, list[str]]]:
    """The events of each, in order, under its name."""
    found: dict[str, list[str]] = defaultdict(list)
    with ExitStack() as stack:
        fleet = stack.enter_context(fleet_on(broker, 2, tmp_path_factory.mktemp("events"), QUICK))
        stack.enter_context(undertaker(fleet.url))
        app = stack.enter_context(bare_app(fleet.url))
        told = stack.enter_context(captured(app))
        names = send(fleet, app)

        def unended() -> list[str]:
            return [names[one] for one in names.keys() - {e["uuid"] for e in told if e["type"] in TERMINAL}]

        with suppress(AssertionError):  # each test says which is missing
            eventually(lambda: not unended(), 30)
        infer(app, task_id=(last := uuid())).apply_async()
        eventually(lambda: any(e.get("uuid") == last and e["type"] in TERMINAL for e in told), what="what comes late")
        for event in told:
            if event.get("uuid") in names:
                found[names[event["uuid"]]].append(event["type"])
        yield found


@pytest.mark.parametrize("place", ["alone", "in a chord"])
@pytest.mark.parametrize("name", BAD)
def test_each_end_is_told_once(name: str, place: str, events: dict[str, list[str]]) -> None:
    """What was received ends; what started ends; and nothing ends twice."""
    told, steps = events[f"{name}, {place}"], STEPS.get(name, ["task-failed"])

    # What is late may be found on its list, before a worker has claimed it.
    assert told == steps or (name in LATE and told == steps[1:])


def test_an_answer_is_told_once(events: dict[str, list[str]]) -> None:
    """A step of a chain is received when it is sent on."""
    assert events["answered"] == [*RAN, "task-succeeded"]


@pytest.fixture(scope="module")
def slow(broker, tmp_path_factory) -> Iterator[FleetUnderTest]:
    """A worker with which requests wait, and then run, for a while each; two at once."""
    with fleet_on(broker, 3, tmp_path_factory.mktemp("slow"), SLOW) as fleet:
        yield fleet


@pytest.mark.parametrize("end", [cancel, revoke])
def test_what_is_cancelled_in_a_worker_ends_once(end: Any, slow: FleetUnderTest) -> None:
    """Queued behind others, waiting for a batch to fill, running: it is revoked, and its chord fails at once."""
    with bare_app(slow.url) as app, captured(app) as told, redis.Redis.from_url(slow.url) as client:

        def seen(request_id: str, *types: str) -> bool:
            return any(event.get("uuid") == request_id and event["type"] in types for event in told)

        running, waiting, queued = ids = uuid(), uuid(), uuid()
        bodies = [chord([infer(app, task_id=running)], infer(app)).apply_async()]
        eventually(lambda: seen(running, "task-started"), what="the start")
        end(slow, app, running)
        eventually(lambda: seen(running, "task-revoked"), what="the end of what runs")
        eventually(lambda: client.zcard("muai:lease:index") == 0, what="the end of its lease")
        bodies.append(chord([infer(app, task_id=waiting)], infer(app)).apply_async())
        eventually(lambda: seen(waiting, "task-received"), what="the claim")
        end(slow, app, waiting)
        bodies.append(chord([infer(app, task_id=queued)], infer(app)).apply_async())
        end(slow, app, queued)
        errors = [body.get(timeout=20, propagate=False) for body in bodies]
        eventually(lambda: all(seen(one, "task-revoked") for one in ids), what="the ends")
        eventually(lambda: not left_behind(client), what="the end of what is kept")

    assert all("Cancelled" in str(error) or "Revoked" in str(error) for error in errors)
    ends = [event["uuid"] for event in told if event["type"] in TERMINAL and event["uuid"] in ids]
    assert sorted(ends) == sorted(ids)
