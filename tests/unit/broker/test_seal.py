"""Only what a worker has written is believed of deliveries and hops."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from shared import wire
from shared.contract import InferenceRequest
from tests.support.clock import START, ManualClock
from workers.broker.seal import UPGRADE_SECONDS, Seal

HOPS = [{"engine": "onnx", "error": "broke", "time": 5.25}]
REQUEST = InferenceRequest.parse({"id": "a", "model": "echo", "inputs": {"prompt": "cat"}})


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def seal(clock: ManualClock) -> Seal:
    """Of a fleet that has had one since the clock's start."""
    return Seal(lambda: b"%d:secret" % (START * 1000), clock)


def message(sent: float = START + 1, **own: Any) -> dict[str, Any]:
    """A decoded message of our client's with this in our own header."""
    return wire.decode_envelope(
        wire.amended(orjson.loads(wire.encode_request(REQUEST, "fake", sent=sent)), header=own)
    )  # fmt: skip


def believed(seal: Seal, envelope: dict[str, Any]) -> dict[str, Any]:
    """What is left of it."""
    seal.check(envelope)
    own = wire.own_header(envelope["headers"])
    return {name: own[name] for name in ("deliveries", "hops") if name in own}


def test_what_workers_write_is_believed_by_others(seal: Seal) -> None:
    """A redelivery after a hop: both are there, and the next one counts on."""
    other = Seal(lambda: b"%d:secret" % (START * 1000))
    first = message()
    hopped = wire.decode_envelope(wire.amended(first, header=seal.sealed(first["headers"], hops=HOPS)))
    again = wire.amended(hopped, header=other.sealed(hopped["headers"], deliveries=1))

    assert believed(seal, wire.decode_envelope(again)) == {"deliveries": 1, "hops": HOPS}


@pytest.mark.parametrize(
    "own",
    [
        {"deliveries": -1000}, {"deliveries": 2}, {"hops": HOPS}, {"deliveries": 2, "seal": "0" * 64},
        {"deliveries": 2, "seal": "é"}, {"deliveries": 2, "seal": 7}, {"deliveries": 2, "sent": START + 3},
        {"deliveries": 2, "sent": 0}, {"deliveries": 2, "sent": "then"}, {"deliveries": 2, "sent": None},
    ],
)  # fmt: skip
def test_what_a_sender_writes_there_is_taken_out(seal: Seal, own: dict[str, Any]) -> None:
    """All else of the header stays."""
    envelope = message(**own)

    assert believed(seal, envelope) == {}
    assert wire.own_header(envelope["headers"])["v"] == 1


@pytest.mark.parametrize("change", [{"deliveries": 0}, {"hops": HOPS}, {"seal": None}])
def test_what_a_worker_wrote_cannot_be_changed(seal: Seal, change: dict[str, Any]) -> None:
    """Nor can another message have it."""
    envelope = message()
    sealed = seal.sealed(envelope["headers"], deliveries=2)
    another = message(**sealed)
    another["headers"]["id"] = "b"

    assert believed(seal, message(**sealed)) == {"deliveries": 2}
    assert believed(seal, message(**{**sealed, **change})) == {}
    assert believed(seal, another) == {}


def test_what_a_release_without_seals_has_written_is_believed_for_a_day(seal: Seal, clock: ManualClock) -> None:
    """It was sent before the fleet had a seal."""
    assert believed(seal, message(START - 5, deliveries=1)) == {"deliveries": 1}
    clock.advance(UPGRADE_SECONDS)
    assert believed(seal, message(START - 5, deliveries=1)) == {}


def test_a_broker_that_was_emptied_has_another_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that had the old one ask again when they seal, or when a seal does not fit, but not for each message."""
    asked, times = [b"1:old"], [0.0]
    monkeypatch.setattr("workers.broker.seal.time.monotonic", lambda: times[-1])
    loads: list[int] = []

    def load() -> bytes:
        loads.append(1)
        return asked[-1]

    mine, theirs = Seal(load), Seal(lambda: asked[-1])
    envelope = message()
    mine.sealed(envelope["headers"], deliveries=1)
    asked.append(b"2:new")
    sealed = message(**theirs.sealed(envelope["headers"], deliveries=1))

    assert believed(mine, orjson.loads(orjson.dumps(sealed))) == {}
    times.append(6.0)
    assert believed(mine, sealed) == {"deliveries": 1}
    for _ in range(5):
        believed(mine, message(deliveries=1, seal="x"))
    assert len(loads) == 2
