"""Senders with odd texts and odd ids: each is told, where it looks, and nobody waits for ever."""

from __future__ import annotations

import json
from typing import Any

import pytest
from celery import chain, chord

from shared import keys, wire
from shared.contract import InferenceRequest, InferenceResult
from shared.errors import BadRequest
from tests.support.fleet import FleetUnderTest
from tests.support.requests import ECHO, bare_app

HALF = "a \ud800 b"
IDS = ["x" * 129, "x" * 5000, "a\nb", "tab\there", "\x1b[31mred", "nul\0", "line\u2028separator", "\u202eright to left"]


def told(answer: Any) -> tuple[str, str]:
    """The name and the text of what a bare caller's answer raises."""
    with pytest.raises(Exception) as caught:  # noqa: PT011  # the class is made by the caller's Celery
        answer.get(timeout=15)
    return type(caught.value).__name__, str(caught.value)


def test_half_characters_are_told_to_bare_callers(fleet: FleetUnderTest, redis_client) -> None:
    """In a prompt, in a list of texts, in a key; and as text in a body that was not encoded as Celery does it."""
    app = bare_app(fleet.url)
    requests = [
        {"model": "echo", "inputs": {"prompt": HALF}},
        {"model": "echo", "kind": "embed", "inputs": {"texts": ["good", HALF]}},
        {"model": HALF, "inputs": {"prompt": "x"}},
        {"model": "echo", "inputs": {"prompt": "x"}, HALF: 1},
        {"model": "echo", "inputs": {"prompt": "x"}, "params": {"temperature": float("nan")}},
        {"model": "echo", "inputs": {"prompt": "x"}, "params": {"json_schema": {"a": float("inf")}}},
    ]
    sent = [app.send_task("muai.infer", kwargs={"request": request}, queue="fake") for request in requests]
    by_args = app.send_task("muai.infer", args=[requests[0]], queue="fake")
    envelope = json.loads(wire.encode_request(InferenceRequest.parse(ECHO), "fake", sent=0.0))
    envelope["body"] = f'[[], {{"request": {{"model": "echo", "inputs": {{"prompt": "{HALF}"}}}}}}, {{}}]'
    redis_client.lpush("fake", json.dumps(envelope))

    assert [told(answer)[0] for answer in [*sent, by_args]] == ["BadRequest"] * 7
    assert "half a character" in told(sent[0])[1]
    assert isinstance(fleet.client.handle(envelope["headers"]["id"]).outcome(10), BadRequest)
    assert fleet.client.submit(ECHO).result(10).text == "olleh"


@pytest.mark.parametrize("queue", ["fake", "onnx"])
def test_odd_ids_are_told_to_bare_callers(make_fleet, queue: str, redis_client) -> None:
    """Too long, or with what no log may hold: the answer is under the id as it is, also from a queue nobody serves."""
    fleet = make_fleet(fleet={"rescue_after_seconds": 0.5, "sweep_seconds": 0.2})
    fleet.start_worker()
    app = bare_app(fleet.url)
    answers = [app.send_task("muai.infer", kwargs={"request": ECHO}, queue=queue, task_id=name) for name in IDS]
    other = app.send_task("no.such.task", queue=queue, task_id="odd\nother")

    assert [told(answer)[0] for answer in [*answers, other]] == ["BadRequest"] * (len(IDS) + 1)
    assert fleet.client.submit(ECHO).result(10).text == "olleh"
    assert all(redis_client.ttl(keys.result_key(name)) > 0 for name in IDS)
    log = fleet.log(fleet.processes[0])
    assert "a\nb" not in log
    assert "\x1b[31m" not in log
    assert "x" * 129 not in log


def test_who_waits_on_later_steps_is_told(fleet: FleetUnderTest) -> None:
    """Of an odd step in a chain, of an odd member of a chord, and of an odd step after a good one."""
    app = bare_app(fleet.url)

    def infer(prompt: str | None = None) -> Any:
        request = {"model": "echo"} if prompt is None else {"model": "echo", "inputs": {"prompt": prompt}}
        return app.signature("muai.infer", kwargs={"request": request}, queue="fake")

    first_odd = chain(infer(HALF), infer()).apply_async()
    last_odd = chain(infer("good"), infer(HALF)).apply_async()
    body = chord([infer("good"), infer(HALF)])(infer())

    assert told(first_odd)[0] == told(last_odd)[0] == "BadRequest"
    assert last_odd.parent.get(timeout=10)["outputs"]["text"] == "doog"
    assert told(body)[0] in ("BadRequest", "ChordError")  # its own error, or that of the member, which Celery looks at


def test_our_client_tells_each_member(fleet: FleetUnderTest) -> None:
    """Nothing of a call is sent where one is odd; of a map, only that one fails, in its place."""
    odd = [
        {"model": "echo", "inputs": {"prompt": HALF}},
        None,
        5,
        {"model": {1}},
        {**ECHO, "id": "a\nb"},
        {b"a": 1},
        object(),
    ]
    for request in odd:
        with pytest.raises(BadRequest):
            fleet.client.submit_many([ECHO, request])
    mixed: list[Any] = [item for request in odd for item in (ECHO, request)]

    found = list(fleet.client.map(mixed, errors="yield"))

    assert [type(outcome) for outcome in found] == [InferenceResult, BadRequest] * len(odd)
    with pytest.raises(BadRequest):
        list(fleet.client.map(mixed))
