"""Limits are one value: what is replaced while a worker runs is in force at once, and what is wrong changes nothing."""

from __future__ import annotations

import pytest

from shared.contract import InferenceRequest
from shared.errors import ConfigurationError, DeadLettered, EngineError
from shared.limits import Limits, LimitsInForce
from shared.settings import Settings
from tests.support.memory_worker import MemoryFleet
from workers.engines.fake import FakeEngine
from workers.models.manager import ModelManager
from workers.path.waiting_room import WaitingRoom
from workers.requests.ending import End
from workers.requests.inflight import InFlight

SETTINGS = Settings.model_validate(
    {"models": {"catalog": {name: {"path": "fake", "engines": ["fake"]} for name in "abc"}}}
)
REQUEST = InferenceRequest.parse({"model": "a", "inputs": {"prompt": "x"}})


@pytest.fixture
def limits() -> LimitsInForce:
    """Those of the defaults."""
    return LimitsInForce(Limits.of(SETTINGS))


def test_they_are_those_of_the_settings(limits: LimitsInForce) -> None:
    """At the start, name by name."""
    assert limits.now.batcher == SETTINGS.optimization.batcher
    assert limits.now.max_deliveries == SETTINGS.fleet.max_deliveries
    assert limits.now.max_cached == SETTINGS.models.max_cached


def test_the_waiting_room_goes_by_what_is_in_force(limits: LimitsInForce) -> None:
    """A smaller batch is full sooner, with what waits already."""
    room = WaitingRoom(FakeEngine(SETTINGS), limits)
    for number in range(4):
        room.add(InFlight(str(number), "fake", {}, {}, "", 1.0), REQUEST, 1.0)

    limits.replace(batcher={"max_batch_size": 3})
    batch = room.next_batch(1.0)

    assert room.most() == 3
    assert batch is not None
    assert len(batch.items) == 3


def test_models_go_by_what_is_in_force(limits: LimitsInForce) -> None:
    """Fewer models are kept, and fewer failures open a breaker."""
    manager = ModelManager(FakeEngine(SETTINGS), SETTINGS, limits)
    for name in "abc":
        manager.get(name)

    limits.replace(max_cached=1, breaker={"failures": 1})
    manager.unload("c", "to load it again")
    manager.get("c")
    manager.failed("c", EngineError("broke"))

    assert [name for name in "abc" if manager.find(name)] == ["c"]
    assert list(manager.failures()) == ["c"]


def test_the_sweeper_goes_by_what_is_in_force(limits: LimitsInForce) -> None:
    """With one delivery allowed, the first worker that dies over a request is the last."""
    from workers.broker.delivery import Swept
    from workers.routing.sweeper import Sweeper

    worker = MemoryFleet(SETTINGS).worker()
    sweeper = Sweeper(worker.delivery, worker.settler, limits)
    swept = Swept("1", "fake", b'{"headers": {"id": "a"}, "properties": {}, "body": "[]", '
                               b'"content-type": "application/json"}')  # fmt: skip
    before = sweeper.ending_of(swept).end

    limits.replace(max_deliveries=1)

    assert before is End.GIVE_BACK
    assert sweeper.ending_of(swept).end is End.DEAD_LETTER
    assert isinstance(sweeper.ending_of(swept).error, DeadLettered)


@pytest.mark.parametrize(
    "change", [{"max_deliveries": 0}, {"batcher": {"max_batch_size": "many"}}, {"no_such": 1}, {"batcher": {"x": 1}}]
)
def test_what_is_wrong_changes_nothing(limits: LimitsInForce, change: dict[str, object]) -> None:
    """One error names it; what was in force stays so."""
    before = limits.now

    with pytest.raises(ConfigurationError, match=next(iter(change))):
        limits.replace(**change)

    assert limits.now is before
