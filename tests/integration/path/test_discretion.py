"""What a request holds and what is answered stay between its caller and the engine: no log, event or error has it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import pytest

from shared import keys
from shared.errors import FleetError
from tests.support.fleet import FleetUnderTest
from tests.support.requests import ECHO, bare_app
from tests.support.shell import muai_says
from tests.support.waiting import eventually
from workers.celery import create_app

MARK = "xyzzy"
REVERSED = MARK[::-1]


class Marker:
    """Makes texts that can be found again wherever they turn up."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, start: str = "") -> str:
        self.count += 1
        return f"{start}{MARK}-{self.count}-what-nobody-else-should-ever-read"


@pytest.fixture
def watched(make_fleet) -> Iterator[tuple[FleetUnderTest, list[dict[str, object]]]]:
    """A fleet whose worker logs at level debug, and every event that is published."""
    fleet: FleetUnderTest = make_fleet(
        fleet={
            "lease_seconds": 1.0,
            "sweep_seconds": 0.2,
            "max_deliveries": 1,
            "max_result_bytes": 5000,
            "heartbeat_seconds": 0.3,
            "rescue_after_seconds": 0.5,
        },
        optimization={"retry": {"attempts": 1, "backoff_ms": 1}, "breaker": {"failures": 1000}},
    )
    app, events = bare_app(fleet.url), []
    listening, done = threading.Event(), threading.Event()

    def listen() -> None:
        with app.connection() as connection:
            receiver = app.events.Receiver(connection, handlers={"*": events.append})
            with receiver.consumer_context(wakeup=False) as (taken, *_):
                while not done.is_set():
                    try:
                        taken.drain_events(timeout=0.1)
                    except TimeoutError:
                        listening.set()

    listener = threading.Thread(target=listen)
    listener.start()
    try:
        assert listening.wait(20)
        fleet.start_worker("fake,control", level="debug")
        yield fleet, events
    finally:
        done.set()
        listener.join()


def test_no_input_and_no_output_gets_out(watched, redis_client) -> None:
    """Requests that succeed, fail, crash the engine, hop, expire, are cancelled, refused, unreadable or given up.

    Their texts, and their answers, are searched for in the workers' logs, in all events, in the errors that callers
    get, in what remote control shows and in the list of dead letters.
    """
    fleet, events = watched
    mark, client, plain = Marker(), fleet.client, bare_app(fleet.url)
    told: list[str] = []

    def ask(prompt: str, **fields: object) -> dict[str, object]:
        params = {"stop": [mark()], **fields.pop("params", {})}  # type: ignore[dict-item]
        return {"model": "echo", "inputs": {"prompt": prompt}, "params": params, **fields}

    schema = {"type": "object", "description": mark(), "properties": {mark(): {}}}
    starts = ("", "!bad ", "!fail ", "!crash ", "!quote ", "!busy ")
    asked = [ask(mark(start)) for start in starts]
    asked += [
        {"model": "echo", "kind": "chat", "inputs": {"messages": [{"role": "user", "content": mark("!quote ")}]}},
        {"model": "echo", "kind": "embed", "inputs": {"texts": [mark(), mark()], "query": mark()}},
        {"model": "echo", "kind": "rerank", "inputs": {"texts": [mark()], "query": mark()}},
        ask(mark(), params={"json_schema": schema}),
        ask(mark() * 200),  # its answer is larger than is kept
        ask(mark(), deadline=1.0),
        {"model": "echo", "inputs": {"prompt": [mark()]}},
        {"model": "echo", "inputs": mark()},
        {"model": "echo", "inputs": {"prompt": "x"}, "params": {"max_tokens": mark()}},
    ]
    # Our own client, then an app that writes what it can into argsrepr and kwargsrepr.
    for request in asked[: len(starts)]:
        told.append(str(client.submit(request).outcome(20)) if request["inputs"]["prompt"][0] == "!" else "")
        client.submit(request).outcome(20)
    sent = [
        plain.send_task("muai.infer", kwargs={"request": request}, queue="fake", headers={"x": 1}) for request in asked
    ]
    sent += [
        plain.send_task("muai.infer", args=[request], queue="fake", argsrepr=mark(), kwargsrepr=mark())
        for request in asked[:2]
    ]
    sent += [
        plain.send_task("muai.infer", kwargs={"request": asked[0], "further": mark()}, queue="fake"),
        plain.send_task("muai.infer", kwargs={"request": asked[0]}, queue="fake", expires=0.000001),
        plain.send_task("muai.infer", kwargs={"request": asked[0]}, queue="control"),
        plain.send_task("muai.infer", kwargs={"request": asked[4]}, queue="onnx"),  # which nobody serves: it hops
        plain.send_task("somebody.else", args=[mark()], kwargs={"a": mark()}, queue="fake"),
        plain.send_task("muai.infer", kwargs={"request": asked[0]}, queue="fake", serializer="pickle"),
        plain.send_task("muai.infer", kwargs={"request": asked[0]}, queue="fake", compression="gzip"),
    ]
    for answer in sent:
        found = client.handle(answer.id).outcome(20)
        told.append(str(found) if isinstance(found, FleetError) else "")
    redis_client.lpush("fake", mark(), json.dumps({"body": mark(), "headers": {}, "properties": {}}))
    late = plain.send_task("muai.infer", kwargs={"request": ask(mark())}, queue="fake", countdown=60)
    eventually(lambda: fleet.client.queue_lengths()["leased"] == 1, what="its wait")
    assert client.cancel(late.id)
    eventually(lambda: redis_client.xlen(keys.DEAD_LETTERS) >= 5, what="the dead letters")
    assert client.submit(ECHO).result(10).text == "olleh"

    inspect = create_app(fleet.settings).control.inspect(timeout=1)
    ids = [answer.id for answer in sent]
    shown = json.dumps([inspect.active(), inspect.reserved(), inspect.query_task(*ids), inspect.stats()])
    dead = muai_says(fleet, "dead", "list") + muai_says(fleet, "dead", "list", "--json")
    log = fleet.log(fleet.processes[0])
    ended = {"task-succeeded", "task-failed", "task-revoked"}
    eventually(lambda: {str(event["type"]) for event in events} >= ended, what="the events")

    assert mark.count >= 40
    assert "DEBUG" in log
    published, errors = json.dumps(events, default=repr), "\n".join(told)
    for name, text in (("log", log), ("events", published), ("errors", errors), ("inspect", shown), ("dead", dead)):
        lines = [line[:300] for line in text.splitlines() if MARK in line or REVERSED in line]
        assert not lines, f"{name}: {lines[:5]}"
    assert "withheld" in "".join(told)
