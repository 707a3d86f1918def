"""Messages that are meant to do harm: none of them runs code, fills the memory or stops a worker."""

from __future__ import annotations

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from kombu import serialization

from shared import keys, wire
from shared.contract import InferenceRequest
from shared.errors import AnswerTooLarge, FleetError, PayloadTooLarge
from tests.support.fleet import FleetUnderTest
from tests.support.requests import ECHO, bare_app
from tests.support.waiting import eventually
from workers.celery import create_app

DEEP = 300
LARGEST = 200_000


def nested(levels: int) -> Any:
    """A list in a list in a list."""
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def envelope(**changes: Any) -> dict[str, Any]:
    """A good message with other headers, properties or body."""
    made = json.loads(wire.encode_request(InferenceRequest.parse(ECHO), "fake", sent=0.0))
    made["headers"] |= changes.pop("headers", {})
    made["properties"] |= changes.pop("properties", {})
    return {**made, **changes}


def asking(**fields: Any) -> str:
    """The body of a call."""
    return json.dumps([[], {"request": {**ECHO, **fields}}, {}])


HOSTILE = {
    "a deep body": envelope(body="[" * 5000 + "]" * 5000),
    "a deep schema": envelope(body=asking(params={"json_schema": {"a": nested(DEEP)}})),
    "deep headers": envelope(headers={"stamps": {"a": nested(DEEP)}}),
    "deep properties": envelope(properties={"x": nested(DEEP)}),
    "large headers": envelope(headers={"shadow": "x" * 100_000}),
    "a zip bomb": envelope(
        headers={"compression": "application/x-gzip"}, properties={"body_encoding": "base64"},
        body=base64.b64encode(gzip.compress(b"0" * 10_000_000)).decode(),
    ),
    "an unknown encoding": envelope(properties={"body_encoding": "rot13"}),
    "a broken encoding": envelope(properties={"body_encoding": "base64"}, body="%%%"),
    "bytes for text": envelope(properties={"body_encoding": "base64"}, body=base64.b64encode(b"\xff\xfe").decode()),
    "no body": envelope(body=None),
    "a number for a body": envelope(body=7),
    "a long id": envelope(headers={"id": "x" * 5000}),
    "an id with a newline": envelope(headers={"id": "a\nb"}),
    "a list for an id": envelope(headers={"id": ["a"]}),
    "a list for a task": envelope(headers={"task": ["muai.infer"]}),
    "no task": envelope(headers={"task": None}, body="not JSON"),
    "too many retries": envelope(headers={"retries": 2**64 - 1}, body=asking(inputs={"prompt": "!fail"})),
    "a tenant that is two": envelope(body=asking(tenant="acme:other")),
    "a tenant with a newline": envelope(body=asking(tenant="acme\n")),
    "a long tenant": envelope(body=asking(tenant="x" * 1000)),
    "a long model": envelope(body=asking(model="x" * 10_000)),
    "a model that writes in colour": envelope(body=asking(model="\x1b[31mred")),
    "a field with a long name": envelope(body=asking(**{"x" * 10_000: 1})),
    "an endless deadline": envelope(body=asking(deadline=1e308)),
    "an endless expiry": envelope(headers={"expires": 1e308}),
    "a start at the end of time": envelope(headers={"eta": 1e308}),
    "a time before time": envelope(headers={"eta": "0001-01-01T00:00:00+23:59", "expires": "noon"}),
    "words for numbers": envelope(headers={"retries": "x", "muai": {"hops": nested(5), "deliveries": "x"}}),
    "too much": envelope(body=asking(inputs={"prompt": "x" * (LARGEST + 1)})),
    "far too much": envelope(body=asking(inputs={"prompt": "x" * 4 * LARGEST})),
}  # fmt: skip


def test_hostile_messages_end_and_nothing_else_does(make_fleet, redis_client) -> None:
    """Each is answered with one short error or kept among the dead letters; requests before and after are answered.

    The same messages lie on a queue that nobody serves, from which a worker moves what it finds.
    """
    fleet = make_fleet(
        fleet={
            "max_payload_bytes": LARGEST, "max_result_bytes": 50_000, "lease_seconds": 1.0, "sweep_seconds": 0.2,
            "heartbeat_seconds": 0.3, "rescue_after_seconds": 0.5,
        },
        optimization={"fake": {"latency_ms": 1500}, "batcher": {"enabled": False}},
    )  # fmt: skip
    fleet.start_worker()
    before = fleet.client.submit(ECHO)
    for name, message in HOSTILE.items():
        for queue in ("fake", "onnx"):
            text = json.dumps(message)
            if _named(message):
                text = text.replace(message["headers"]["id"], f"{queue}-{name}")
            redis_client.lpush(queue, text)
    moved = bare_app(fleet.url).send_task("muai.infer", kwargs={"request": ECHO}, queue="onnx", priority=9)

    assert before.result(20).text == "olleh"
    told = {}
    for name in filter(lambda name: _named(HOSTILE[name]), HOSTILE):
        told[name] = found = fleet.client.handle(f"fake-{name}").outcome(20)
        assert isinstance(found, FleetError) or name == "words for numbers", (name, found)
        assert len(str(found)) < 1000, (name, found)
    eventually(lambda: not fleet.client.queue_lengths()["onnx"], what="the end of the queue that nobody serves")
    assert moved.get(timeout=20)["outputs"]["text"] == "olleh"
    assert isinstance(told["too much"], PayloadTooLarge)
    assert isinstance(told["far too much"], PayloadTooLarge)
    # Its lease is kept for longer than it lasts by itself, and its worker still says that it lives.
    assert fleet.client.submit(ECHO).result(20).text == "olleh"
    with pytest.raises(AnswerTooLarge, match="fleet.max_result_bytes"):
        fleet.client.submit(model="echo", inputs={"prompt": "x" * 60_000}, params={"max_tokens": 100_000}).result(20)
    eventually(lambda: fleet.client.queue_lengths()["leased"] == 0, what="the end of all leases")
    (worker,) = fleet.client.fleet()
    assert worker.pid == fleet.processes[0].pid
    assert "Traceback" not in fleet.log(fleet.processes[0])


def _named(message: dict[str, Any]) -> bool:
    return bool(wire.usable_id(message["headers"]["id"]))


class Evil:
    """Unpickled or read as YAML, it writes a file."""

    def __init__(self, file: Path) -> None:
        self.file = str(file)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.file, "w")


def test_nothing_is_unpickled_or_read_as_yaml(fleet: FleetUnderTest, redis_client, tmp_path: Path) -> None:
    """Tasks, results and remote control of an app that is configured for pickle or YAML: refused, and nothing runs."""
    file = tmp_path / "it-ran"
    yaml = f"!!python/object/apply:builtins.open ['{file}', 'w']"
    serialization.register("yaml-text", lambda _: yaml, lambda text: text, "application/x-yaml", "utf-8")
    app = Celery("elsewhere", broker=fleet.url, backend=fleet.url, set_as_current=False)
    app.conf.update(task_serializer="pickle", result_serializer="pickle", accept_content=["pickle", "json"])
    ours = create_app(fleet.settings)

    try:
        pickled = app.send_task("muai.infer", kwargs={"request": Evil(file)}, queue="fake")
        as_yaml = app.send_task("muai.infer", kwargs={"request": 1}, queue="fake", serializer="yaml-text")
    finally:
        serialization.unregister("yaml-text")
    app.control.mailbox.serializer = "pickle"
    app.control.broadcast("ping", arguments={"x": Evil(file)})
    key = keys.result_key("a-pickled-result")
    redis_client.set(key, serialization.dumps({"status": "SUCCESS", "result": Evil(file)}, "pickle")[2])

    for answer in (pickled, as_yaml):
        found = fleet.client.handle(answer.id).outcome(10)
        assert "only application/json is accepted" in str(found)
    eventually(lambda: "is passed over" in fleet.log(fleet.processes[0]), what="the refusal of the command")
    with pytest.raises(Exception, match=r"decode|byte|JSON|Expecting"):
        _ = ours.AsyncResult("a-pickled-result").state
    assert redis_client.xlen(keys.DEAD_LETTERS) == 2
    assert list(ours.control.inspect(timeout=2).ping().values()) == [{"ok": "pong"}]
    assert fleet.client.submit(ECHO).result(10).text == "olleh"
    assert not file.exists()


def test_a_worker_can_be_deaf_to_remote_control(make_fleet) -> None:
    """With fleet.remote_control off, a shutdown that anybody may have published is not obeyed."""
    fleet = make_fleet(fleet={"remote_control": False})
    fleet.start_worker()
    app = bare_app(fleet.url)

    app.control.broadcast("shutdown")

    assert app.control.inspect(timeout=1).ping() is None
    assert fleet.client.submit(ECHO).result(10).text == "olleh"
    assert fleet.processes[0].poll() is None
