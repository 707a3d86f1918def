"""Further headers of a message: what a sender may add, and that it changes nothing else."""

from __future__ import annotations

import orjson
import pytest
from celery import Celery
from celery.app.task import Context
from pydantic import SecretStr

from shared import wire
from shared.contract import InferenceRequest
from shared.errors import BadRequest
from shared.headers import CELERYS, MAX_FURTHER_BYTES, check_headers
from shared.signing import Signer

REQUEST = InferenceRequest.parse({"id": "one", "model": "m", "inputs": {"prompt": "words"}})
TRACE = {
    "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    "tracestate": "vendor=t61rcWkgMzE,other=00f067aa0ba902b7",
    "baggage": "user=4711",
}


def headers_of(payload: bytes) -> dict[str, object]:
    """The headers of a message."""
    return wire.decode_envelope(payload)["headers"]


def test_a_trace_context_stands_among_the_headers() -> None:
    """Further headers are added to the others and replace none of them."""
    plain = headers_of(wire.encode_request(REQUEST, "onnx", sent=1.0, reply="muai:reply:me"))

    traced = headers_of(wire.encode_request(REQUEST, "onnx", sent=1.0, reply="muai:reply:me", headers=TRACE))

    assert traced == {**plain, **TRACE}


def test_further_headers_outlive_what_workers_amend() -> None:
    """A redelivery, a hop and a replay write the same message again."""
    envelope = wire.decode_envelope(wire.encode_request(REQUEST, "onnx", sent=1.0, headers=TRACE))

    again = headers_of(wire.amended(envelope, header={"deliveries": 1, "hops": [1]}, retries=2))

    assert again == {**envelope["headers"], "retries": 2, "muai": {**envelope["headers"]["muai"], "deliveries": 1,
                                                                   "hops": [1]}}  # fmt: skip


def test_further_headers_are_not_signed() -> None:
    """Who handles a message may go on with its trace; what is asked for stays what was signed."""
    signer = Signer(SecretStr("a key of this fleet"))
    envelope = orjson.loads(wire.encode_request(REQUEST, "onnx", sent=1.0, sign=signer.sign, headers=TRACE))

    envelope["headers"]["traceparent"] = TRACE["traceparent"].replace("00f0", "11f1")

    signer.check(envelope)


@pytest.mark.parametrize("name", ["id", "task", "retries", "compression", "args", "muai", "muai.more"])
def test_a_clash_is_an_error(name: str) -> None:
    """Celery's headers and ours are not to be set: the error names the header."""
    with pytest.raises(BadRequest, match=rf"'{name}' belongs to (Celery|this project)"):
        wire.encode_request(REQUEST, "onnx", sent=1.0, headers={name: "x"})


@pytest.mark.parametrize(
    "headers",
    [
        {"": "x"},
        {"Traceparent": "x"},
        {"a b": "x"},
        {"a" * 65: "x"},
        {7: "x"},
        {"a": 7},
        {"a": "two\nlines"},
        {"a": "\u00e9"},
        {"a": "x" * MAX_FURTHER_BYTES},
        {f"h{n}": "x" * 1000 for n in range(20)},
    ],
)
def test_names_values_and_size_are_bounded(headers) -> None:
    """What no HTTP header could hold, and what is too much, is refused."""
    with pytest.raises(BadRequest, match="message header"):
        check_headers(headers)


def test_all_headers_of_celery_are_known() -> None:
    """What Celery writes into a message, and what it reads from the headers as attributes of a task's request."""
    app = Celery("stock", set_as_current=False)
    written = app.amqp.as_task_v2("one", "muai.infer", (), {}).headers
    read = {name for name in vars(Context) if not name.startswith("_")}

    assert set(written) | read <= CELERYS
