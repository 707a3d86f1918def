"""Further headers on their way through a real fleet: over an outage, a dead queue and a dead worker."""

from __future__ import annotations

import json
import subprocess
import sys
from contextvars import ContextVar
from pathlib import Path

import pytest
from celery import chord, group
from celery.canvas import Signature

from producer import Client
from shared import keys, wire
from shared.contract import InferenceRequest
from shared.embedded import EmbeddedBroker
from shared.errors import BadRequest
from tests.integration.observe.header_notes import NOTES
from tests.support.fleet import ROOT, FleetUnderTest
from tests.support.requests import bare_app
from tests.support.waiting import eventually

ECHO = {"model": "echo", "inputs": {"prompt": "abc"}}
TRACE = ContextVar("TRACE", default="nothing")


def headers_of(request: InferenceRequest) -> dict[str, str]:
    """A trace context of the caller, and what the request itself says."""
    return {"traceparent": TRACE.get(), "tracestate": f"model={request.model}"}


def waiting(client, queue: str) -> list[dict[str, object]]:
    """The headers of the messages on a queue."""
    return [wire.decode_envelope(payload)["headers"] for payload in client.lrange(keys.list_of(queue, 3), 0, -1)]


def start_noting(fleet: FleetUnderTest, notes: Path) -> subprocess.Popen[bytes]:
    """A worker with a receiver of Celery's signals that notes the headers of what runs."""
    with (fleet.folder / "log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", "workers", "worker", "-Q", "fake",
             "--include", "tests.integration.observe.header_notes"],
            cwd=ROOT, env={**fleet.environ, NOTES: str(notes)}, stdout=log, stderr=log,
        )  # fmt: skip
    fleet.processes.append(process)
    return process


def test_headers_come_from_the_callers_context(make_fleet, redis_client) -> None:
    """The function is called with each request when it is submitted, where it is submitted."""
    fleet = make_fleet()
    TRACE.set("of the caller")

    with Client(settings=fleet.settings, headers=headers_of) as client:
        client.submit_many([ECHO, ECHO], timeout=60)

    assert [(found["traceparent"], found["tracestate"]) for found in waiting(redis_client, "fake")] == [
        ("of the caller", "model=echo")
    ] * 2


def test_a_clash_refuses_the_call(make_fleet, redis_client) -> None:
    """Nothing is submitted, and nobody waits for it."""
    fleet = make_fleet()

    with (
        Client(settings=fleet.settings, headers=lambda _: {"retries": "1"}) as client,
        pytest.raises(BadRequest, match="'retries' belongs to Celery"),
    ):
        client.submit_many([ECHO, ECHO], timeout=60)

    assert waiting(redis_client, "fake") == []


def test_headers_outlast_an_outage_in_the_spool(tmp_path, make_fleet) -> None:
    """What was spooled has the headers of the time at which it was submitted, though another client delivers it."""
    with EmbeddedBroker(tmp_path / "own") as own:
        options = {"redis_url": own.url, "spool_path": str(tmp_path / "spool.db"), "on_outage": "spool"}
        settings = make_fleet(fleet=options).settings
        own.stop()
        TRACE.set("before the outage ended")
        with Client(settings=settings, headers=headers_of) as client:
            client.submit(ECHO, timeout=600)
        own.start()

        with Client(settings=settings) as client:
            (headers,) = eventually(lambda: waiting(client._redis, "fake"), 20, "the delivery")

        assert headers["traceparent"] == "before the outage ended"


def test_headers_survive_a_hop_and_a_killed_worker(tmp_path, make_fleet) -> None:
    """A receiver of Celery's signals finds them on the request that was moved to another queue and delivered again."""
    fleet = make_fleet(
        fleet={"rescue_after_seconds": 0.5, "heartbeat_seconds": 0.2, "lease_seconds": 1.0, "sweep_seconds": 0.2},
        optimization={"engine_preference": ["onnx", "fake"], "fake": {"latency_ms": 1500}},
        models={"catalog": {"echo": {"engines": ["onnx", "fake"]}}},
    )
    notes = tmp_path / "notes"
    TRACE.set("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")

    with Client(settings=fleet.settings, headers=headers_of) as client:
        handle = client.submit(ECHO, timeout=120)
        doomed = start_noting(fleet, notes)
        eventually(lambda: notes.exists() and notes.read_text().endswith("\n"), 60, "the first run")
        doomed.kill()
        start_noting(fleet, notes)

        assert handle.result(60).text == "cba"

    first, second = (json.loads(line) for line in notes.read_text().splitlines())
    assert first["id"] == second["id"] == handle.id
    assert first["headers"]["traceparent"] == second["headers"]["traceparent"] == TRACE.get()
    assert second["headers"]["muai"]["deliveries"] == 1
    assert len(second["headers"]["muai"]["hops"]) == 1


def test_headers_go_on_to_what_follows(tmp_path, make_fleet) -> None:
    """To every later step of a chain, to the body of a chord, to links and to links of errors, groups and all."""
    fleet = make_fleet()
    notes = tmp_path / "notes"
    app = bare_app(fleet.url)
    trace = {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "x-tenant": "acme"}

    def call(name: str, **request: object) -> Signature:
        return app.signature("muai.infer", kwargs={"request": {"model": "echo", **request}}, queue="fake", task_id=name)

    first = {"inputs": {"prompt": "abc"}}
    start_noting(fleet, notes)

    linked = call("first", **first)
    linked.link(call("linked"))
    (linked | call("second") | group([call("third"), call("own").set(headers={"x-tenant": "own"})])).apply_async(
        headers=trace
    )
    chord([call("member", **first).set(headers=trace)], call("body")).apply_async()
    broken = call("broken", inputs={"prompt": "!bad"})
    broken.apply_async(headers=trace, link_error=call("afterwards", **first))

    names = {"first", "linked", "second", "third", "own", "member", "body", "afterwards"}

    def noted() -> dict[str, dict[str, str]]:
        lines = notes.read_text().splitlines() if notes.exists() else []
        return {found["id"]: found["headers"] for found in map(json.loads, lines)}

    eventually(lambda: names <= noted().keys(), 60, "all steps")
    assert {name: noted()[name].get("traceparent") for name in names} == dict.fromkeys(names, trace["traceparent"])
    assert {name: noted()[name].get("x-tenant") for name in names} == {**dict.fromkeys(names, "acme"), "own": "own"}
