"""Whatever lands on a queue: one clear error to the caller or a dead letter, and the requests around it go on."""

from __future__ import annotations

import base64
import json
import pickle

import pytest

from producer import Client
from shared import keys, wire
from shared.contract import InferenceRequest
from shared.errors import BadRequest, FleetError, PayloadTooLarge, UnknownModel, UnsupportedKind
from tests.support.fleet import FleetUnderTest
from tests.support.requests import ECHO, bare_app
from tests.support.waiting import eventually


def send_raw(fleet: FleetUnderTest, request: dict[str, object]) -> str:
    """Put a request on the queue past our own client's checks, as another service would; returns its id."""
    return str(bare_app(fleet.url).send_task("muai.infer", kwargs={"request": request}, queue="fake").id)


def outcome_of(client: Client, request_id: str) -> FleetError:
    """The error that the request ended with."""
    found = client.handle(request_id).outcome(10)
    assert isinstance(found, FleetError)
    return found


@pytest.mark.parametrize(
    ("request_", "error", "says"),
    [
        ({"model": 3, "inputs": {"prompt": "x"}}, BadRequest, "model: Input should be a valid string"),
        ({"model": "echo", "inputs": {"prompt": ["x"]}}, BadRequest, "inputs.prompt"),
        ({"model": "echo", "inputs": {"prompt": "x"}, "params": {"max_tokens": 0}}, BadRequest, "params.max_tokens"),
        ({"model": "echo", "kind": "guess", "inputs": {"prompt": "x"}}, BadRequest, "kind"),
        ({"model": "echo", "kind": "embed", "inputs": {"texts": []}}, BadRequest, "inputs.texts is empty"),
        ({"model": "echo", "kind": "chat", "inputs": {"messages": []}}, BadRequest, "inputs.messages is empty"),
        ({"model": "echo", "inputs": {"prompt": "x"}, "colour": "red"}, BadRequest, "colour"),
        ({"model": "gpt-9", "inputs": {"prompt": "x"}}, UnknownModel, "gpt-9.*there are: echo"),
        ({"model": "echo", "kind": "classify", "inputs": {"texts": ["x"]}}, UnsupportedKind, "does not serve classify"),
    ],
)
def test_a_bad_request_is_its_callers_error(fleet: FleetUnderTest, request_, error, says) -> None:
    """The same words whether our client refuses it before sending or a worker does after."""
    with pytest.raises(error, match=says):
        fleet.client.submit(request_)

    found = outcome_of(fleet.client, send_raw(fleet, request_))

    with pytest.raises(error, match=says):
        raise found
    assert fleet.client.submit(ECHO).result(10).text == "olleh"


def test_oversized_payload_is_refused_on_both_sides(make_fleet) -> None:
    """Above max_payload_bytes the client refuses, and a worker does where the sender is another."""
    fleet = make_fleet(fleet={"max_payload_bytes": 2000})
    fleet.start_worker()
    large = {"model": "echo", "inputs": {"prompt": "x" * 5000}}

    with pytest.raises(PayloadTooLarge, match="at most 2000"):
        fleet.client.submit(large)

    assert isinstance(outcome_of(fleet.client, send_raw(fleet, large)), PayloadTooLarge)
    assert fleet.client.submit(ECHO).result(10).text == "olleh"


def test_unreadable_messages_become_dead_letters(fleet: FleetUnderTest, redis_client) -> None:
    """Broken JSON, JSON that is no message, and bytes at random are kept with a reason; the worker goes on."""
    rubbish = [b"{not json", b"[1,2]", b'{"a": 1}', b"\x80\x04\x95\xff", b""]
    redis_client.lpush("fake", *rubbish)

    eventually(lambda: redis_client.xlen(keys.DEAD_LETTERS) == len(rubbish), what="the dead letters")
    assert fleet.client.submit(ECHO).result(10).text == "olleh"
    reasons = [fields[b"reason"] for _, fields in redis_client.xrange(keys.DEAD_LETTERS)]
    kept = [fields[b"message"] for _, fields in redis_client.xrange(keys.DEAD_LETTERS)]
    assert all(reasons)
    assert sorted(kept) == sorted(rubbish)


def test_a_pickle_is_refused_unread_and_its_caller_told(fleet: FleetUnderTest, redis_client) -> None:
    """A message with a pickled body is never unpickled: its caller gets the error, and it is kept."""
    envelope = json.loads(wire.encode_request(InferenceRequest.parse(ECHO), "fake", sent=0.0))
    envelope["content-type"] = "application/x-python-serialize"
    envelope["body"] = base64.b64encode(pickle.dumps(([], {}, {}))).decode()
    envelope["properties"]["body_encoding"] = "base64"
    redis_client.lpush("fake", json.dumps(envelope))

    found = outcome_of(fleet.client, envelope["headers"]["id"])

    assert "only application/json is accepted" in str(found)
    assert redis_client.xlen(keys.DEAD_LETTERS) == 1
    assert fleet.client.submit(ECHO).result(10).text == "olleh"


@pytest.mark.parametrize("body", ['"text"', "[1]", "[[],{}", "[{},[],{}]", "null", '[[1],{"request":{}},{}]'])
def test_a_body_that_is_no_call(fleet: FleetUnderTest, redis_client, body: str) -> None:
    """A message whose body is not args, kwargs and embed fails with one clear error."""
    envelope = json.loads(wire.encode_request(InferenceRequest.parse(ECHO), "fake", sent=0.0))
    envelope["body"] = body
    redis_client.lpush("fake", json.dumps(envelope))

    found = outcome_of(fleet.client, envelope["headers"]["id"])

    assert isinstance(found, BadRequest)
    assert fleet.client.submit(ECHO).result(10).text == "olleh"


def test_a_message_of_another_task(fleet: FleetUnderTest, redis_client) -> None:
    """A task this fleet does not have fails for its caller and is kept; the queue goes on."""
    answer = bare_app(fleet.url).send_task("somebody.else", args=[1], queue="fake")

    with pytest.raises(Exception, match="somebody.else"):
        answer.get(timeout=10)
    eventually(lambda: redis_client.xlen(keys.DEAD_LETTERS) == 1, what="the dead letter")
    assert fleet.client.submit(ECHO).result(10).text == "olleh"


def test_strange_headers_harm_nobody(fleet: FleetUnderTest, redis_client) -> None:
    """Our own header with values of the wrong type, wrong times and wrong numbers: an answer or a clear error."""
    for header in (
        {"hops": "x"},
        {"hops": [{"engine": "abacus"}]},
        {"sent": "noon"},
        {"reply": 7},
        {"deliveries": "many"},
        5,
    ):
        envelope = json.loads(wire.encode_request(InferenceRequest.parse({**ECHO}), "fake", sent=0.0))
        envelope["headers"]["muai"] = header
        redis_client.lpush("fake", json.dumps(envelope))
        assert fleet.client.handle(envelope["headers"]["id"]).outcome(10) is not None
    for change in ({"eta": "noon"}, {"expires": {}}, {"retries": "x"}, {"group": 5}):
        envelope = json.loads(wire.encode_request(InferenceRequest.parse({**ECHO}), "fake", sent=0.0))
        envelope["headers"].update(change)
        redis_client.lpush("fake", json.dumps(envelope))
        assert fleet.client.handle(envelope["headers"]["id"]).outcome(10) is not None

    assert fleet.client.submit(ECHO).result(10).text == "olleh"


def test_one_bad_member_does_not_fail_its_batch(make_fleet) -> None:
    """Of a full batch with one refused, one failing and one that crashes the engine, only these three fail."""
    fleet = make_fleet(optimization={"batcher": {"adaptive_batching": False, "batch_timeout_ms": 300}})
    fleet.start_worker()
    prompts = [f"p{i}" for i in range(32)]
    prompts[5], prompts[11], prompts[17] = "!bad", "!fail", "!crash"

    handles = fleet.client.submit_many([{"model": "echo", "inputs": {"prompt": prompt}} for prompt in prompts])
    outcomes = [handle.outcome(10) for handle in handles]

    failed = [prompt for prompt, found in zip(prompts, outcomes, strict=True) if isinstance(found, FleetError)]
    assert failed == ["!bad", "!fail", "!crash"]


def test_prompts_and_outputs_stay_out_of_logs_and_events(fleet: FleetUnderTest) -> None:
    """Neither a prompt nor its answer is in the worker's log, whether the request succeeds or fails."""
    for prompt in ("secret-prompt-1", "!bad secret-prompt-2", "!crash secret-prompt-3"):
        fleet.client.submit(model="echo", inputs={"prompt": prompt}).outcome(10)
    send_raw(fleet, {"model": "echo", "inputs": {"prompt": "secret-prompt-4", "colour": "secret-prompt-5"}})
    assert fleet.client.submit(ECHO).result(10)

    text = fleet.log(fleet.processes[0])

    assert "secret-prompt" not in text
    assert "tpmorp-terces" not in text


@pytest.mark.parametrize("reply", ["fake", "muai:lease:index", "muai:reply:taken", "", "x" * 5000])
def test_a_reply_stream_that_is_none_harms_nobody(fleet: FleetUnderTest, redis_client, reply: str) -> None:
    """Whatever key a sender names for its replies, it is answered through its result, and the batch around it too."""
    redis_client.lpush("muai:reply:taken", "a list, not a stream")
    envelope = json.loads(wire.encode_request(InferenceRequest.parse(ECHO), "fake", sent=0.0, reply=reply))
    redis_client.lpush("fake", json.dumps(envelope))

    assert fleet.client.handle(envelope["headers"]["id"]).result(10).text == "olleh"
    assert [handle.result(10).text for handle in fleet.client.submit_many([ECHO] * 5)] == ["olleh"] * 5
    assert redis_client.type("fake") in (b"none", b"list")
    assert fleet.processes[0].poll() is None


@pytest.mark.parametrize(
    "embed", [{"chain": 5}, {"chain": ["abc"]}, {"callbacks": [7]}, {"errbacks": "x"}, {"chord": [1]}, {"chain": [{}]}]
)
@pytest.mark.parametrize("prompt", ["hello", "!bad"])
def test_a_canvas_that_is_none_fails_its_own_request_only(fleet, redis_client, embed, prompt: str) -> None:
    """A malformed chain, callback or chord ends with an answer for its sender; the worker goes on."""
    envelope = json.loads(wire.encode_request(InferenceRequest.parse(ECHO), "fake", sent=0.0))
    envelope["body"] = json.dumps([[], {"request": {"model": "echo", "inputs": {"prompt": prompt}}}, embed])
    redis_client.lpush("fake", json.dumps(envelope))

    assert isinstance(fleet.client.handle(envelope["headers"]["id"]).outcome(10), FleetError)
    assert fleet.client.submit(ECHO).result(10).text == "olleh"
    assert fleet.processes[0].poll() is None
    assert fleet.client.queue_lengths()["leased"] == 0


@pytest.mark.parametrize(
    ("protocol", "request_", "says"),
    [
        (1, ECHO, "the message is of Celery's task protocol 1, .* send protocol 2"),
        (
            2,
            {**ECHO, "params": {"temperature": float("nan")}},
            "body holds NaN, which JSON does not have",
        ),
        (2, {**ECHO, "params": {"temperature": float("-inf")}}, "holds -Infinity, which JSON does not have"),
    ],
)
def test_what_is_wrong_with_a_message_is_what_is_said(fleet: FleetUnderTest, protocol, request_, says) -> None:
    """The sender is told, at once and in words that help."""
    app = bare_app(fleet.url)
    app.conf.task_protocol = protocol

    answer = app.send_task("muai.infer", kwargs={"request": request_}, queue="fake")

    with pytest.raises(Exception, match=says) as error:
        answer.get(timeout=10)
    assert type(error.value).__name__ == ("UndecodableMessage" if protocol == 1 else "BadRequest")


def test_any_task_of_protocol_1_is_told_what_is_wrong(fleet: FleetUnderTest) -> None:
    """Not that it has no name."""
    app = bare_app(fleet.url)
    app.conf.task_protocol = 1

    with pytest.raises(Exception, match="task protocol 1"):
        app.send_task("somebody.elses", queue="fake").get(timeout=10)
