"""What no request can be is its caller's ``BadRequest``, in words that can be written, before anything is sent."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import reduce
from typing import Any

import orjson
import pytest

from producer.client.submission import checked_id, checked_timeout, prepare
from shared import wire
from shared.clock import BrokerClock
from shared.contract import SCHEMA_DEPTH, InferenceRequest
from shared.errors import BadRequest
from shared.json_values import flaw

HALF = "\ud800"
LOOP: dict[str, Any] = {}
LOOP["a"] = LOOP
DEEP = reduce(lambda inner, _: [inner], range(3000), [])
DEEP_TUPLE = reduce(lambda inner, _: (inner,), range(3000), ())


def asking(**fields: Any) -> dict[str, Any]:
    """A request with these fields."""
    return {"model": "echo", "inputs": {"prompt": "x"}, **fields}


def inputs(kind: str, **fields: Any) -> dict[str, Any]:
    """A request of a kind with these inputs."""
    return {"model": "echo", "kind": kind, "inputs": fields}


def schema(value: Any) -> dict[str, Any]:
    """A request that is held to a schema with this in it."""
    return asking(params={"json_schema": {"a": value}})


TEXTS = [
    inputs("generate", prompt="a" + HALF), inputs("embed", texts=["a", HALF]), inputs("embed", texts=HALF),
    inputs("rerank", texts=["a"], query=HALF), inputs("chat", messages=[{"role": "user", "content": HALF}]),
    asking(model=HALF), asking(id=HALF), asking(tenant=HALF), asking(conversation_id=HALF), asking(kind=HALF),
    asking(params={"stop": [HALF]}), asking(**{HALF: 1}), {"model": "echo", "inputs": {HALF: "x"}},
    schema(HALF), schema({HALF: 1}), schema([[HALF]]), asking(params={"json_schema": {HALF: 1}}),
]  # fmt: skip
NUMBERS = [
    *(asking(params={name: value}) for name in ("temperature", "top_p") for value in (float("nan"), float("inf"))),
    *(asking(params={name: 10**digits}) for name in ("max_tokens", "top_k", "seed") for digits in (25, 5000)),
    asking(params={"temperature": 10**400}), asking(deadline=float("nan")), asking(deadline=float("inf")),
    asking(deadline=10**400), schema(float("nan")), schema([float("-inf")]), schema(2**80), schema(-(2**80)),
]  # fmt: skip
BYTES = [
    inputs("generate", prompt=b"x"), inputs("generate", prompt=bytearray(b"x")), inputs("embed", texts=[b"x"]),
    inputs("embed", texts=b"x"), inputs("chat", messages=[{"role": "user", "content": b"x"}]), asking(model=b"echo"),
    asking(id=b"id"), asking(tenant=b"acme"), asking(params={"stop": [b"x"]}), asking() | {b"a": 1}, schema(b"x"),
]  # fmt: skip
SHAPES = [
    asking() | {1: 2}, asking() | {None: 2}, {"model": "echo", "inputs": {1: "x"}}, schema({1: 2}),
    inputs("embed", texts={"a", "b"}), inputs("embed", texts={"a": 1}), asking(params={"stop": frozenset("ab")}),
    asking(engine_preference={"onnx", "pytorch"}), asking(inputs={"prompt"}), schema({1}), asking(inputs=object()),
    inputs("generate", prompt=object()), schema(object()), asking(deadline=datetime.now(UTC)), asking(inputs=DEEP),
    inputs("generate", prompt=DEEP), schema(DEEP), schema(DEEP_TUPLE), schema(LOOP), LOOP, {},
    *(asking(id=name) for name in ("x" * 5000, "a\nb", "a\0b", "\x1b[31m", "\u2028", "", 5, None, ["a"])),
]  # fmt: skip
NO_REQUESTS = [None, 5, "text", b"bytes", ["model"], {"model"}, object(), float("nan"), ()]


@pytest.mark.parametrize("request_", [*TEXTS, *NUMBERS, *BYTES, *SHAPES, *NO_REQUESTS], ids=lambda _: "")
def test_an_odd_request_is_a_bad_one(request_: Any) -> None:
    """One line says why, without half characters of its own."""
    with pytest.raises(BadRequest) as caught:
        prepare(request_, None, BrokerClock())

    told = orjson.loads(wire.failure_meta("x", caught.value))["result"]["exc_message"][0]
    assert 0 < len(told) < 1000
    assert "\n" not in told


def test_a_request_made_past_its_validation_is_a_bad_one_when_it_is_sent() -> None:
    """Not an error of the library that writes it."""
    good = InferenceRequest.parse(asking())
    for changes in ({"model": HALF}, {"inputs": good.inputs.model_copy(update={"prompt": HALF})}, {"id": object()}):
        with pytest.raises(BadRequest, match="cannot be written as JSON"):
            wire.encode_request(good.model_copy(update=changes), "fake", sent=0.0)


@pytest.mark.parametrize("text", ["caf\u00e9", "\U0001f600 \u732b", "\ufffd", "a\0b\n\t\x7f\u2028"])
def test_every_other_text_is_good(text: str) -> None:
    """It comes out as it went in."""
    request = InferenceRequest.parse(inputs("embed", texts=[text], query=text))

    body = orjson.loads(orjson.loads(wire.encode_request(request, "fake", sent=0.0))["body"])

    assert body[1]["request"]["inputs"] == {"texts": [text], "query": text}


@pytest.mark.parametrize("timeout", ["5", float("nan"), float("inf"), object(), [1], 10**400])
def test_a_timeout_that_is_none_is_the_callers_error(timeout: Any) -> None:
    """Before anything is sent."""
    with pytest.raises(BadRequest, match="timeout"):
        checked_timeout(timeout)


@pytest.mark.parametrize("name", [HALF, 5, None, b"id", "", ["id"], "x" * 100_000])
def test_an_id_that_can_be_none_is_the_callers_error(name: Any) -> None:
    """Where a request is asked for."""
    with pytest.raises(BadRequest, match="id"):
        checked_id(name)


def test_a_value_that_json_has_is_without_flaw() -> None:
    """Up to the depth that is allowed."""
    value: Any = {"a": [1, -(2**63), 2**64 - 1, 1.5, True, None, "\U0001f600", ()]}
    for _ in range(SCHEMA_DEPTH - 3):
        value = [value]

    assert flaw(value, SCHEMA_DEPTH) == ""
    assert flaw([[value]], SCHEMA_DEPTH) == f"is nested more than {SCHEMA_DEPTH} deep"


def test_half_a_character_that_pythons_writer_lets_through_is_read() -> None:
    """So that it can be said where it is, and to whom."""
    assert flaw(wire.loads(b'["\\ud800"]'), 9) != ""


@pytest.mark.parametrize("text", [b'{"a": NaN}', b'{"a": -Infinity, "b": "\\udfff\\ud800"}'])
def test_a_number_that_pythons_writer_lets_through_is_named(text: bytes) -> None:
    """It is the sender's error."""
    with pytest.raises(BadRequest, match="which JSON does not have"):
        wire.loads(text)


@pytest.mark.parametrize("text", [b"{", b"[NaN", b"\xff", b"[" * 100_000, b"", b"1" * 5000 + b"x", "\ud800"])
def test_what_is_no_json_is_not(text: bytes | str) -> None:
    """One kind of error, whatever it is."""
    with pytest.raises(orjson.JSONDecodeError):
        wire.loads(text)
