"""Which parts of a canvas are told of an end, in which order, and what becomes of it when one of them cannot be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from pydantic import SecretStr
from redis.exceptions import ConnectionError as RedisConnectionError

from shared.errors import DeadLettered, EngineError, UndecodableMessage
from shared.signing import Signer
from workers.ends.canvas import Canvas
from workers.requests.ending import Ending
from workers.requests.inflight import InFlight

STEP = {"task": "muai.infer", "args": [], "kwargs": {}, "options": {"task_id": "next"}}
EVERYTHING = {
    "chain": [STEP],
    "chord": {**STEP, "chord_size": 2},
    "errbacks": [{"task": "clean.up"}],
    "callbacks": None,
}
KEY = "the key of this fleet"


class Backend:
    """Notes who is told; what ``broken`` names raises what it says."""

    def __init__(self, **broken: Exception) -> None:
        self.told: list[tuple[str, str]] = []
        self._broken = broken

    def _tell(self, who: str, state: str) -> None:
        if who in self._broken:
            raise self._broken[who]
        self.told.append((who, state))

    def _fail_chain(self, chain: Any, error: Any, state: str) -> None:
        if chain:
            self._tell("chain", state)

    def on_chord_part_return(self, context: Any, state: str, error: Any) -> None:
        self._tell("chord", state)

    def _call_task_errbacks(self, context: Any, error: Any, traceback: Any) -> None:
        self._tell("errbacks", "FAILURE")


def item(embed: Any = EVERYTHING, *, signed_by: str = "") -> InFlight:
    """A request with a canvas, as it came from the queue."""
    headers = {"id": "one", "task": "muai.infer", "group": "all"}
    body = orjson.dumps([[], {}, embed]).decode()
    if signed_by:
        headers["muai"] = Signer(SecretStr(signed_by)).sign(headers, body)
    return InFlight("7", "fake", headers, {}, body, 100.0)


def canvas(backend: Backend, key: str | None = None) -> Canvas:
    """A canvas room over that backend."""
    return Canvas(SimpleNamespace(backend=backend), Signer(key and SecretStr(key)))


FAILURES = {
    "failure": lambda one: Ending.failed(one, EngineError("x")),
    "dead letter": lambda one: Ending.dead(one, DeadLettered("x"), "x"),
    "refusal": lambda one: Ending.refused(one, UndecodableMessage("x")),
}
REVOCATIONS = {"cancel": Ending.cancelled, "expiry": Ending.expired}
OTHERS = {
    "hop": lambda one: Ending.hops(one, "onnx", None, here="fake", now=1.0),
    "delay": lambda one: Ending.delayed(one, 200.0),
    "give-back": Ending.given_back,
    "redelivery": Ending.redelivery,
    "duplicate": Ending.duplicate,
}


@pytest.mark.parametrize("end", FAILURES)
def test_a_failure_is_told_to_everybody(end: str) -> None:
    """The steps after it, its chord, and its callbacks for errors."""
    canvas(backend := Backend()).tell(FAILURES[end](item()))

    assert backend.told == [("chain", "FAILURE"), ("chord", "FAILURE"), ("errbacks", "FAILURE")]


@pytest.mark.parametrize("end", REVOCATIONS)
def test_nobody_cancels_by_mistake(end: str) -> None:
    """A cancelled or expired request calls no callback for errors."""
    canvas(backend := Backend()).tell(REVOCATIONS[end](item()))

    assert backend.told == [("chain", "REVOKED"), ("chord", "REVOKED")]


@pytest.mark.parametrize("end", OTHERS)
def test_what_goes_on_tells_nobody(end: str) -> None:
    """The canvas of a request that is to come back has not ended."""
    canvas(backend := Backend()).tell(OTHERS[end](item()))

    assert backend.told == []


@pytest.mark.parametrize("broken", ["chain", "chord", "errbacks"])
def test_what_is_wrong_with_one_keeps_nobody_else_waiting(broken: str) -> None:
    """Where one of them cannot be told the others are, and the error is raised then."""
    backend = Backend(**{broken: KeyError("task")})

    with pytest.raises(KeyError):
        canvas(backend).tell(Ending.failed(item(), EngineError("x")))

    assert [who for who, _ in backend.told] == [who for who in ("chain", "chord", "errbacks") if who != broken]


def test_a_broker_that_fails_is_not_asked_for_more() -> None:
    """All of it is tried again when the broker is back, so nobody is told twice meanwhile."""
    backend = Backend(chord=RedisConnectionError("gone"))

    with pytest.raises(RedisConnectionError):
        canvas(backend).tell(Ending.failed(item(), EngineError("x")))

    assert backend.told == [("chain", "FAILURE")]


@pytest.mark.parametrize("end", {**FAILURES, **REVOCATIONS})
@pytest.mark.parametrize("signed_by", ["", "somebody else"])
def test_a_forged_message_ends_nobodys_chord(end: str, signed_by: str) -> None:
    """With a key, what is not signed with it calls nothing and fails nothing, however it ends."""
    canvas(backend := Backend(), KEY).tell({**FAILURES, **REVOCATIONS}[end](item(signed_by=signed_by)))

    assert backend.told == []


def test_a_tampered_message_ends_nobodys_chord() -> None:
    """What was changed on the way is not believed; what was not is."""
    tampered, right = item(signed_by=KEY), item(signed_by=KEY)
    tampered.body = tampered.body.replace("next", "else")

    canvas(backend := Backend(), KEY).tell(Ending.refused(tampered, UndecodableMessage("x")))
    assert backend.told == []
    canvas(backend, KEY).tell(Ending.refused(right, UndecodableMessage("x")))
    assert [who for who, _ in backend.told] == ["chain", "chord", "errbacks"]
