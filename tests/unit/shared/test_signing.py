"""Signatures: what they cover, what they outlive, and how a key is changed."""

from __future__ import annotations

import orjson
import pytest
from pydantic import SecretStr

from shared import wire
from shared.contract import EngineName, InferenceRequest
from shared.errors import ConfigurationError, EngineError, WrongSignature
from shared.masking import masked
from shared.settings import Settings
from shared.settings_loader import load_settings
from shared.signing import Signer
from workers.ends.settlements import settlement_of
from workers.requests.ending import Ending
from workers.requests.inflight import InFlight

OLD, NEW = "a key of the old days", "a key of the new days"
REQUEST = InferenceRequest.parse({"id": "one", "model": "m", "inputs": {"prompt": "words"}})


def signer(*keys: str) -> Signer:
    """Of these keys."""
    return Signer(SecretStr(",".join(keys)))


def message(keys: Signer) -> bytes:
    """A signed message."""
    return wire.encode_request(REQUEST, "onnx", sent=1.0, reply="muai:reply:me", sign=keys.sign)


def test_what_a_worker_amends_leaves_the_signature_valid() -> None:
    """Counted deliveries, a hop with its history and another count of retries: the next worker accepts it."""
    keys = signer(OLD)
    envelope = wire.decode_envelope(message(keys))
    item = InFlight("1", "onnx", envelope["headers"], envelope["properties"], envelope["body"], 2.0)

    redelivered = wire.amended(envelope, header={"deliveries": 2})
    hop = Ending.hops(item, EngineName.PYTORCH, EngineError("x"), here=EngineName.ONNX, now=2.0)
    hopped = settlement_of(hop).push_message

    for payload in (redelivered, hopped):
        keys.check(wire.decode_envelope(payload))


@pytest.mark.parametrize(
    "change",
    [
        {"body": '[[],{"request":{"model":"m","inputs":{"prompt":"other words"}}},{}]'},
        {"headers": {"id": "two"}},
        {"headers": {"task": "other"}},
        {"headers": {"eta": "2030-01-01T00:00:00"}},
        {"headers": {"muai": {"reply": "muai:reply:somebody-else"}}},
        {"headers": {"muai": {"signature": None}}},
        {"headers": {"muai": {"signature": 7}}},
        {"headers": {"muai": {"signature": "é" * 64}}},
    ],
)
def test_what_was_asked_for_cannot_be_changed(change) -> None:
    """Another body, id, task, time or place for the reply, or no signature at all, is refused."""
    keys = signer(OLD)
    envelope = orjson.loads(message(keys))
    headers = change.get("headers", {})
    envelope["headers"] |= {**headers, "muai": {**envelope["headers"]["muai"], **headers.get("muai", {})}}
    envelope["body"] = change.get("body", envelope["body"])

    with pytest.raises(WrongSignature):
        keys.check(wire.decode_envelope(orjson.dumps(envelope)))


def test_keys_are_changed_without_a_pause() -> None:
    """The first key signs, all of them are accepted; one that was dropped is not."""
    old, both, new = signer(OLD), signer(NEW, OLD), signer(NEW)

    both.check(wire.decode_envelope(message(old)))
    new.check(wire.decode_envelope(message(both)))
    with pytest.raises(WrongSignature, match="another key"):
        new.check(wire.decode_envelope(message(old)))


def test_without_a_key_nothing_is_signed_and_everything_accepted() -> None:
    """Signing is off by default."""
    none = Signer(None)

    assert not none
    none.check(wire.decode_envelope(wire.encode_request(REQUEST, "onnx", sent=1.0)))


def test_a_key_is_shown_nowhere() -> None:
    """Neither in the settings' text, nor in what they are dumped to, nor in the error about one that is too short."""
    settings = Settings.model_validate({"fleet": {"signing_key": OLD}})

    assert OLD not in repr(settings)
    assert OLD not in str(masked(settings.model_dump(mode="json")))
    assert masked({"signing_key": OLD}) == {"signing_key": "***"}
    with pytest.raises(ConfigurationError, match="openssl rand") as caught:
        load_settings(environ={"MUAI_FLEET_SIGNING_KEY": f"{OLD},short"})
    assert OLD not in str(caught.value)
