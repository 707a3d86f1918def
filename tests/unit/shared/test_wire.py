"""Messages as they are on the queue."""

from __future__ import annotations

import json

import orjson
import pytest
from celery import Celery
from kombu.transport.virtual import Message

from shared import wire
from shared.contract import InferenceRequest
from shared.errors import PayloadTooLarge, UndecodableMessage

REQUEST = InferenceRequest.parse({"id": "one", "model": "m", "inputs": {"prompt": "secret words"}, "priority": "low"})


def test_our_message_has_every_header_of_a_stock_one() -> None:
    """A message written by us carries the headers and properties that Celery itself writes, so anyone can read it."""
    app = Celery("stock", set_as_current=False)
    stock = app.amqp.as_task_v2("one", "muai.infer", (), {"request": {}})

    ours = orjson.loads(wire.encode_request(REQUEST, "onnx", sent=12.5, reply="stream"))

    assert set(stock.headers) <= set(ours["headers"])
    assert set(stock.properties) <= set(ours["properties"])
    assert ours["properties"]["delivery_info"] == {"exchange": "", "routing_key": "onnx"}
    assert ours["properties"]["priority"] == 6


def test_the_body_decodes_to_the_same_request_through_kombu() -> None:
    """Kombu's own message class reads our envelope, and the request in it is the one that was written."""
    envelope = orjson.loads(wire.encode_request(REQUEST, "onnx", sent=12.5))

    class Channel:
        @staticmethod
        def decode_body(body, encoding):
            assert encoding is None
            return body

    message = Message(envelope, channel=Channel(), accept={"application/json"})
    args, kwargs, embed = message.decode()

    assert args == []
    assert InferenceRequest.parse(kwargs["request"]) == REQUEST
    assert set(embed) == {"callbacks", "errbacks", "chain", "chord"}


def test_inputs_are_in_the_body_only() -> None:
    """No header shows the prompt: headers end up in events and logs."""
    envelope = orjson.loads(wire.encode_request(REQUEST, "onnx", sent=12.5))

    assert "secret words" in envelope.pop("body")
    assert "secret words" not in str(envelope)


def test_a_message_above_the_limit_is_refused_with_both_sizes() -> None:
    """The error says how large it is, how large it may be, and the key to change."""
    with pytest.raises(PayloadTooLarge, match=r"at most 50 .*fleet.max_payload_bytes"):
        wire.encode_request(REQUEST, "onnx", sent=0.0, max_bytes=50)


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (b"{", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"{}", "no headers or no properties"),
        (b'{"headers": {}, "properties": {}, "content-type": "application/x-yaml"}', "only application/json"),
    ],
)
def test_what_is_no_message_says_why(payload: bytes, says: str) -> None:
    """Each way to be no message has its own words."""
    with pytest.raises(UndecodableMessage, match=says):
        wire.decode_envelope(payload)


def test_amended_changes_only_what_it_is_told() -> None:
    """A hop rewrites the history and the retries and leaves everything else as it was."""
    envelope = orjson.loads(wire.encode_request(REQUEST, "onnx", sent=12.5, reply="stream"))

    changed = orjson.loads(wire.amended(envelope, header={"hops": [1]}, retries=2))

    assert changed["headers"]["muai"] == {**envelope["headers"]["muai"], "hops": [1]}
    assert changed["headers"]["retries"] == 2
    changed["headers"] = envelope["headers"]
    assert changed == envelope


def test_a_plain_celery_message_is_read_without_what_it_says_of_its_arguments() -> None:
    """The body comes out of its base64; what would end up in logs and events is emptied."""
    app = Celery("stock", broker="memory://", set_as_current=False)
    with app.connection() as connection, connection.channel() as channel:
        task = app.amqp.as_task_v2("one", "muai.infer", (), {"request": {"inputs": {"prompt": "secret words"}}})
        envelope = channel.prepare_message(
            orjson.dumps(task.body).decode(), content_type="application/json", content_encoding="utf-8",
            headers=task.headers, properties=task.properties,
        )  # fmt: skip
        envelope["body"], envelope["properties"]["body_encoding"] = channel.encode_body(envelope["body"], "base64")
    assert "secret words" in envelope["headers"]["kwargsrepr"]

    read = wire.decode_envelope(orjson.dumps(envelope))

    assert orjson.loads(read["body"])[1]["request"]["inputs"]["prompt"] == "secret words"
    assert "secret words" not in str({**read, "body": ""})
    assert read["properties"]["body_encoding"] is None


def test_headers_are_bounded_whatever_the_body_is() -> None:
    """A body that is escaped letter by letter is not mistaken for headers; headers that are too large are refused."""
    envelope = orjson.loads(wire.encode_request(REQUEST, "onnx", sent=12.5))
    for letter in ("\u00e9", "\u732b", '"'):
        envelope["body"] = letter * 100_000
        assert wire.decode_envelope(json.dumps(envelope).encode(), 300_000)["body"] == envelope["body"]

    with pytest.raises(PayloadTooLarge, match="fleet.max_payload_bytes"):
        wire.decode_envelope(orjson.dumps(envelope), 10_000)
    envelope["headers"]["origin"] = "x" * 500_000
    with pytest.raises(UndecodableMessage, match="headers are more than"):
        wire.decode_envelope(orjson.dumps(envelope))
