"""What starts when, and what goes back to its queue."""

from __future__ import annotations

from collections.abc import Sequence

import orjson
import pytest

from shared.contract import EngineName
from shared.errors import EngineBusy, EngineError
from tests.support.memory_worker import MemoryFleet, MemoryWorker, settings_of
from workers.broker.delivery import Settlement, Written
from workers.requests.inflight import State

FAKE = EngineName.FAKE
LIST = "fake\x06\x163"


def start(slots: int | None = None, **batcher: object) -> tuple[MemoryFleet, MemoryWorker]:
    fleet = MemoryFleet(settings_of(FAKE, batcher={"max_batch_size": 3} | batcher, max_deliveries=3))
    return fleet, fleet.worker(FAKE, slots=slots)


def submit(fleet: MemoryFleet, *names: str, deliveries: int = 0) -> None:
    for name in names:
        fleet.submit(name, deliveries=deliveries)


def running(worker: MemoryWorker) -> list[list[str]]:
    return [[item.id for item in run.batch.items] for run in worker.runners[FAKE].runs]


def waiting(fleet: MemoryFleet) -> list[str]:
    """The ids on the queue, the next to be claimed first."""
    return [orjson.loads(message)["headers"]["id"] for message in fleet.broker.queues.waiting().get(LIST, [])]


def test_no_more_is_claimed_than_the_next_batch_takes():
    fleet, worker = start()
    submit(fleet, "a", "b", "c", "d", "e")
    worker.turn()

    assert running(worker) == [["a", "b", "c"]]
    assert waiting(fleet) == ["d", "e"]
    worker.runners[FAKE].complete()
    worker.turn()
    fleet.pass_time(0.05)
    worker.turn()
    assert running(worker) == [["d", "e"]]


def test_a_partial_batch_starts_when_its_time_is_over():
    fleet, worker = start(adaptive_batching=False, batch_timeout_ms=50.0)
    submit(fleet, "a")
    worker.turn()
    assert (running(worker), worker.loop.next_timer) == ([], fleet.clock() + 0.05)

    fleet.pass_time(0.05)
    worker.turn()

    assert running(worker) == [["a"]]


def test_an_engine_with_slots_is_given_each_by_itself_and_a_quarter_ahead():
    fleet, worker = start(slots=4)
    submit(fleet, *"abcdefg")
    worker.turn()

    assert running(worker) == [["a"], ["b"], ["c"], ["d"], ["e"]]
    assert waiting(fleet) == ["f", "g"]


def test_nothing_is_claimed_while_the_models_are_loaded():
    fleet, worker = start()
    worker.runners[FAKE].loaded.clear()
    submit(fleet, "a")
    worker.turn()

    assert waiting(fleet) == ["a"]


def test_what_waits_and_is_not_wanted_is_not_started():
    fleet, worker = start(adaptive_batching=False, max_batch_size=4)
    fleet.submit("late", deadline=fleet.clock() + 0.02)
    fleet.submit("revoked")
    fleet.submit("good")
    worker.turn()
    worker.revoked.add("revoked")
    fleet.pass_time(0.05)
    worker.turn()

    assert running(worker) == [["good"]]
    assert fleet.error("late").startswith("DeadlineExceeded")
    assert fleet.status("revoked") == "REVOKED"


def test_what_would_wait_for_a_running_batch_is_left_to_a_peer():
    """Without one it is kept."""
    fleet, worker = start(adaptive_batching=False, batch_timeout_ms=50.0)
    submit(fleet, "a", "b")
    worker.turn()
    fleet.submit("other", kind="generate", inputs={"prompt": "x" * 5000})
    worker.turn()
    peer = fleet.worker(FAKE)
    fleet.pass_time(0.05)
    worker.turn()

    assert running(worker) == [["a", "b"]]
    peer.turn()
    assert [item.id for intake in peer.intakes.values() for item in intake.table] == ["other"]


# -- what may be what its workers died of -----------------------------------------------------------------------------


def test_the_last_try_is_made_alone():
    """What was claimed with it goes back in its order, and nothing is claimed until it is through."""
    fleet, worker = start()
    submit(fleet, "a")
    submit(fleet, "last", deliveries=2)
    submit(fleet, "b", "c")
    worker.turn()

    assert running(worker) == [["last"]]
    assert waiting(fleet) == ["a", "b", "c"]
    worker.runners[FAKE].complete()
    worker.turn()
    assert running(worker) == [["a", "b", "c"]]


def test_one_that_runs_alone_waits_for_what_runs():
    fleet, worker = start(slots=4)
    submit(fleet, "a")
    worker.turn()
    submit(fleet, "last", deliveries=2)
    worker.turn()
    assert running(worker) == [["a"]]

    worker.runners[FAKE].complete()
    worker.turn()

    assert running(worker) == [["last"]]


def test_one_that_runs_alone_takes_nobody_along_who_rests():
    """A request that rests between two tries is in this worker's hands as well: it goes back first."""
    fleet, worker = start()
    submit(fleet, "resting")
    worker.turn()
    worker.runners[FAKE].complete(EngineBusy())
    worker.turn()
    submit(fleet, "last", deliveries=2)
    worker.turn()

    assert running(worker) == [["last"]]
    assert waiting(fleet) == ["resting"]
    assert {item.id for item in worker.intakes[FAKE].table} == {"last"}


def test_one_that_runs_alone_waits_until_what_ran_is_concluded():
    """A request of the last batch that comes to rest goes back before it starts."""
    fleet, worker = start(slots=2)
    submit(fleet, "busy")
    worker.turn()
    submit(fleet, "last", deliveries=2)
    worker.turn()
    worker.runners[FAKE].complete(EngineBusy())
    worker.turn()

    assert running(worker) == [["last"]]
    assert {item.id for item in worker.intakes[FAKE].table} == {"last"}


@pytest.mark.parametrize("done", [False, True])
def test_one_that_runs_alone_is_not_started_before_the_others_have_gone_back(
    done: bool, monkeypatch: pytest.MonkeyPatch
):
    """Where the broker fails over that, before or after it was done, it starts when the broker is back."""
    fleet, worker = start()
    submit(fleet, "a")
    submit(fleet, "last", deliveries=2)
    settle, commands = fleet.broker.settle, []

    def settle_but_fail_once(settlements: Sequence[Settlement]) -> list[Written]:
        commands.append(settlements)
        if len(commands) == 1:
            if done:
                settle(settlements)
            raise ConnectionError("the broker is away")
        return settle(settlements)

    monkeypatch.setattr(fleet.broker, "settle", settle_but_fail_once)
    assert not worker.turn()
    assert running(worker) == []
    worker.connect(silent=True)
    worker.turn()

    assert running(worker) == [["last"]]
    assert waiting(fleet) == ["a"]


def test_a_second_last_try_waits_in_the_queue_for_the_first():
    fleet, worker = start()
    submit(fleet, "first", "second", deliveries=2)
    worker.turn()

    assert running(worker) == [["first"]]
    assert waiting(fleet) == ["second"]
    assert worker.intakes[FAKE].table.count(State.ALONE) == 0


def test_what_a_stopping_worker_gives_back_keeps_its_order():
    """What ran, what waited for it and what was claimed last, before what has come since; however many they are."""
    fleet, worker = start(slots=400)
    names = [f"r{number}" for number in range(500)]
    submit(fleet, *names, "younger")
    worker.turn()
    assert waiting(fleet) == ["younger"]
    worker.begin_stop()
    worker.wind_up(hurry=True)

    assert waiting(fleet) == [*names, "younger"]


def test_what_hops_together_keeps_its_order():
    """An engine's batch that goes on to the next engine."""
    fleet = MemoryFleet(settings_of(FAKE, EngineName.PYTORCH))
    worker = fleet.worker(FAKE)
    fleet.worker(EngineName.PYTORCH).runners[EngineName.PYTORCH].loaded.clear()
    submit(fleet, "a", "b", "c")
    worker.turn()
    worker.runners[FAKE].complete(EngineError("broke"))
    worker.turn()

    on_the_other = fleet.broker.queues.waiting()[LIST.replace("fake", "pytorch")]
    assert [orjson.loads(message)["headers"]["id"] for message in on_the_other] == ["a", "b", "c"]


def test_what_was_claimed_ahead_is_told_when_it_is_late():
    """While the batch before it takes longer than its like; the same goes for what was cancelled."""
    fleet, worker = start()
    submit(fleet, "a", "b", "c")
    worker.turn()
    worker.runners[FAKE].complete()
    worker.turn()
    submit(fleet, "e", "f", "g")
    worker.turn()
    fleet.submit("late", deadline=fleet.clock() + 1.5)
    submit(fleet, "gone", "patient")
    worker.turn()
    assert waiting(fleet) == []
    fleet.cancel("gone")
    fleet.pass_time(2)
    worker.tend()
    worker.turn()

    assert fleet.error("late").startswith("DeadlineExceeded")
    assert fleet.status("gone") == "REVOKED"
    assert [item.id for item in worker.intakes[FAKE].table.all(State.WAITING)] == ["patient"]
    worker.runners[FAKE].complete()
    worker.turn()
    assert running(worker) == [["patient"]]
    assert fleet.broker.deadlines == {}


@pytest.mark.parametrize("state", [State.ALONE, State.RESTING])
def test_what_waits_in_another_way_is_told_when_it_is_late(state: State):
    """A last try that waits until nothing else runs, which then goes on; and a request that rests after an error."""
    fleet = MemoryFleet(settings_of(FAKE, retry={"backoff_ms": 5000.0}, max_deliveries=3))
    worker = fleet.worker(FAKE, slots=4)
    if state is State.ALONE:
        submit(fleet, "a")
        worker.turn()
    fleet.submit("late", deadline=fleet.clock() + 6, deliveries=2 if state is State.ALONE else 0)
    worker.turn()
    if state is State.RESTING:
        worker.runners[FAKE].complete(EngineBusy())
        worker.turn()
    assert worker.intakes[FAKE].table.count(state) == 1
    fleet.clock.advance(6)
    worker.tend()
    worker.turn()

    assert fleet.error("late").startswith("DeadlineExceeded")
    submit(fleet, "b")
    worker.turn()
    assert ["b"] in running(worker)
