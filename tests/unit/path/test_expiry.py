"""Which requests are refused because they cannot be answered in time, and which go to a worker that may."""

from __future__ import annotations

import orjson
import pytest

from shared import keys, wire
from shared.contract import EngineName
from tests.support.memory_worker import MemoryFleet, MemoryWorker, settings_of
from workers.path.run_times import ENOUGH, RECENT_SECONDS
from workers.requests.inflight import MOST_PASSED

FAKE = EngineName.FAKE


@pytest.fixture
def fleet() -> MemoryFleet:
    return MemoryFleet(settings_of(FAKE, batcher={"max_batch_size": 2}))


@pytest.fixture
def worker(fleet: MemoryFleet) -> MemoryWorker:
    return fleet.worker(FAKE)


def run(fleet: MemoryFleet, worker: MemoryWorker, name: str, seconds: float, **fields: object) -> None:
    """Answer a request after so long."""
    fleet.submit(name, **fields)
    worker.turn()
    (batch,) = worker.runners[FAKE].runs
    fleet.pass_time(seconds)
    for item in list(batch.unreported):
        worker.runners[FAKE].finish(batch, item, seconds=seconds)
    worker.runners[FAKE].end(batch, seconds)
    worker.turn()


def learn(fleet: MemoryFleet, worker: MemoryWorker, seconds: float = 5.0, times: int = ENOUGH) -> None:
    for number in range(times):
        run(fleet, worker, f"{worker.name}-{number}-{fleet.clock()}", seconds)


def running(worker: MemoryWorker) -> list[str]:
    return [item.id for run in worker.runners[FAKE].runs for item in run.unreported]


def test_what_cannot_be_answered_in_time_is_refused_before_it_runs(fleet: MemoryFleet, worker: MemoryWorker):
    learn(fleet, worker)
    fleet.submit("a", deadline=fleet.clock() + 2)
    worker.turn()

    assert fleet.error("a") == "DeadlineExceeded: the deadline cannot be met: such requests take 5.000 s or more"
    assert running(worker) == []


@pytest.mark.parametrize("first", [30.0, 600.0])
def test_a_slow_first_run_refuses_nobody(fleet: MemoryFleet, worker: MemoryWorker, first: float):
    run(fleet, worker, "slow", first)
    fleet.submit("a", deadline=fleet.clock() + 2)
    worker.turn()

    assert running(worker) == ["a"]


def test_long_answers_are_no_evidence_of_short_ones(fleet: MemoryFleet, worker: MemoryWorker):
    for number in range(ENOUGH + 1):
        run(fleet, worker, f"long-{number}", 20.0, params={"max_tokens": 4096})
    for number in range(ENOUGH + 1):
        run(fleet, worker, f"large-{number}", 20.0, inputs={"prompt": "cat " * 2000})
    fleet.submit("a", deadline=fleet.clock() + 2)
    worker.turn()

    assert running(worker) == ["a"]


def test_what_was_learnt_is_forgotten(fleet: MemoryFleet, worker: MemoryWorker):
    """So a worker that has become quick again does not refuse for good: what it refuses teaches it nothing."""
    learn(fleet, worker)
    fleet.pass_time(RECENT_SECONDS + 1)
    fleet.submit("a", deadline=fleet.clock() + 2)
    worker.turn()

    assert running(worker) == ["a"]


# -- where another worker may do it -----------------------------------------------------------------------------------


def test_what_another_worker_may_answer_in_time_is_left_to_it(fleet: MemoryFleet, worker: MemoryWorker):
    learn(fleet, worker)
    other = fleet.worker(FAKE)
    fleet.submit("a", deadline=fleet.clock() + 2)
    worker.turn()
    assert (running(worker), fleet.status("a")) == ([], None)

    other.turn()

    assert running(other) == ["a"]
    assert worker.witness.endings[-1].end == "give-back"


def test_what_was_left_to_a_busy_worker_is_not_taken_back_at_once(fleet: MemoryFleet, worker: MemoryWorker):
    """It waits in that worker's lane; whoever finds it there later leaves it there again."""
    learn(fleet, worker)
    other = fleet.worker(FAKE)
    fleet.submit("a", deadline=fleet.clock() + 3)
    for _ in range(10):
        worker.turn()
    lane = keys.list_of("fake", 3, affinity=other.name)
    (message,) = fleet.broker.queues.waiting()[lane]
    assert wire.own_header(orjson.loads(message)["headers"])["passed"] == [worker.name]
    ends = len(worker.witness.endings)

    fleet.pass_time(1)
    worker.turn()

    assert len(worker.witness.endings) == ends + 1
    assert len(fleet.broker.queues.waiting()[lane]) == 1
    other.turn()
    assert running(other) == ["a"]


def test_where_every_worker_has_said_that_it_cannot_the_request_is_refused(fleet: MemoryFleet, worker: MemoryWorker):
    """Each is asked once."""
    other = fleet.worker(FAKE)
    learn(fleet, worker)
    learn(fleet, other)
    before = len(worker.witness.endings) + len(other.witness.endings)
    fleet.submit("a", deadline=fleet.clock() + 2)
    for _ in range(5):
        worker.turn()
        other.turn()

    assert fleet.error("a").startswith("DeadlineExceeded: the deadline cannot be met")
    assert len(worker.witness.endings) + len(other.witness.endings) == before + 2


def test_no_more_than_a_few_workers_are_asked(fleet: MemoryFleet):
    workers = [fleet.worker(FAKE) for _ in range(MOST_PASSED + 3)]
    for one in workers:
        learn(fleet, one, seconds=1.0)
    fleet.submit("a", deadline=fleet.clock() + 0.5)
    for _ in range(10):
        for one in workers:
            one.turn()

    assert fleet.error("a").startswith("DeadlineExceeded: the deadline cannot be met")
    assert sum(ending.worker != "" for one in workers for ending in one.witness.endings) == MOST_PASSED


def test_a_sender_that_names_workers_is_not_believed_to_have_asked_them(fleet: MemoryFleet, worker: MemoryWorker):
    """What is no list of names is passed over, and what is one is no reason to refuse what can be answered."""
    for number, passed in enumerate(["x", [1, None], {"a": 1}, ["w1"] * 1000]):
        fleet.submit(f"a{number}", headers={wire.HEADER: {"v": 1, "passed": passed}})
    worker.turn()
    worker.runners[FAKE].complete()
    worker.turn()
    worker.runners[FAKE].complete()
    worker.turn()

    assert [fleet.status(f"a{number}") for number in range(4)] == ["SUCCESS"] * 4
