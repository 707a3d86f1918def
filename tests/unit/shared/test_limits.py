"""The limits: one value that is replaced while a worker runs, and seen by everybody who asks."""

from __future__ import annotations

import pytest

from shared.contract import EngineName
from shared.errors import ConfigurationError, EngineBusy, EngineError
from shared.limits import Limits, LimitsInForce
from tests.support.items import item_of
from tests.support.memory_worker import MODEL, MemoryFleet, settings_of
from tests.support.scripted import ScriptedEngine, scripted_models
from workers.path.waiting import WaitingRoom

FAKE = EngineName.FAKE


def test_a_section_is_given_as_what_changes_in_it():
    limits = LimitsInForce(Limits())
    found = limits.replace(batcher={"max_batch_size": 7}, max_deliveries=9)

    assert found is limits.now
    assert (found.batcher.max_batch_size, found.batcher.max_batch_tokens, found.max_deliveries) == (7, 65536, 9)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batcher": {"max_batch_size": 0}}, "batcher.max_batch_size"),
        ({"max_deliveries": "many", "max_cached": 5}, "max_deliveries"),
        ({"colour": "red"}, "colour"),
        ({"retry": {"attemps": 1}}, "retry.attemps"),
        ({"batcher": {"min_batch_size": 64}}, "batcher"),
        ({"tenants": {"acme": {"weight": -1}}}, "tenants.acme.weight"),
    ],
)
def test_a_bad_one_changes_nothing_and_is_one_clear_error(changes: dict[str, object], named: str):
    limits = LimitsInForce(Limits())
    before = limits.now
    with pytest.raises(ConfigurationError, match="cannot be changed") as error:
        limits.replace(**changes)

    assert named in str(error.value)
    assert "\n" not in str(error.value)
    assert limits.now is before


def test_the_waiting_room_goes_by_what_is_in_force():
    settings = settings_of(FAKE, batcher={"adaptive_batching": False, "batch_timeout_ms": 1000.0})
    limits = LimitsInForce(Limits.of(settings))
    room = WaitingRoom(ScriptedEngine(settings), limits)
    for name in "ab":
        item = item_of(name)
        room.add(item, item.request, 100.0)
    assert (room.next_batch(100.0), room.most(), room.due_at(100.0)) == (None, 32, 101.0)

    limits.replace(batcher={"max_batch_size": 2})
    assert (room.most(), room.due_at(100.0)) == (2, 100.0)
    limits.replace(batcher={"enabled": False})
    assert [len(room.next_batch(100.0).items) for _ in range(2)] == [1, 1]


def test_the_conclusion_goes_by_what_is_in_force():
    """How often a passing error is tried again."""
    fleet = MemoryFleet(settings_of(FAKE, retry={"attempts": 5}))
    worker = fleet.worker(FAKE)
    fleet.submit("a")
    worker.turn()
    worker.limits.replace(retry={"attempts": 0})
    worker.runners[FAKE].complete(EngineBusy())
    worker.turn()

    assert fleet.error("a").startswith("EngineBusy")


def test_the_model_manager_goes_by_what_is_in_force():
    """How many failures in a row rest a model, and how many models stay in memory."""
    settings = settings_of(FAKE, breaker={"failures": 5})
    limits = LimitsInForce(Limits.of(settings))
    models = scripted_models(settings, limits)
    models.failed(MODEL, EngineError("broke"))
    limits.replace(breaker={"failures": 2})
    models.failed(MODEL, EngineError("broke"))

    assert list(models.failures()) == [MODEL]


def test_a_claim_goes_by_what_is_in_force():
    """How many more urgent requests pass a waiting one."""
    fleet = MemoryFleet(settings_of(FAKE))
    worker = fleet.worker(FAKE)
    worker.limits.replace(starvation_limit=1)
    for number in range(4):
        fleet.submit(f"high-{number}", priority="high")
    fleet.submit("low", priority="low")
    claimed = [message.payload for message in worker.delivery.claim("fake", 2).messages]

    assert [b'"id":"low"' in payload for payload in claimed] == [False, True]
