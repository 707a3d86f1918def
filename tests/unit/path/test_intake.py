"""An engine's requests as a whole: what is lost to others, what is not wanted any longer, and how it all stops."""

from __future__ import annotations

import orjson
import pytest

from shared.contract import EngineName
from shared.errors import EngineBusy
from tests.support.memory_worker import LEASE_SECONDS, MemoryFleet, MemoryWorker, settings_of
from workers.broker.memory import Failure
from workers.path.admission import CLOCKS_APART_SECONDS
from workers.requests.inflight import State

FAKE = EngineName.FAKE
LIST = "fake\x06\x163"
AWAY = ConnectionError("the broker is away")


@pytest.fixture
def fleet() -> MemoryFleet:
    return MemoryFleet(settings_of(FAKE, batcher={"max_batch_size": 2}))


@pytest.fixture
def worker(fleet: MemoryFleet) -> MemoryWorker:
    return fleet.worker(FAKE)


def submit(fleet: MemoryFleet, *names: str) -> None:
    for name in names:
        fleet.submit(name)


def waiting(fleet: MemoryFleet) -> list[str]:
    return [orjson.loads(message)["headers"]["id"] for message in fleet.broker.queues.waiting().get(LIST, [])]


def steps(worker: MemoryWorker) -> dict[str, list[str]]:
    return {item.id: told for item, told in worker.witness.steps.items()}


def lapse(fleet: MemoryFleet, stalled: MemoryWorker, sweeper: MemoryWorker) -> None:
    """The worker stands still until its leases have lapsed, and another takes them over."""
    fleet.pass_time(LEASE_SECONDS + 1, [stalled])
    sweeper.sweeper.sweep()
    stalled.leases.keep()


# -- leases that are lost ---------------------------------------------------------------------------------------------


def test_what_others_have_taken_over_is_let_go_and_not_answered(fleet: MemoryFleet, worker: MemoryWorker):
    """The engine is told, and what it still says is not wanted."""
    submit(fleet, "a")
    worker.turn()
    other = fleet.worker(FAKE)
    lapse(fleet, worker, other)
    worker.tend()
    assert (worker.in_flight, [item.id for item in worker.runners[FAKE].aborted]) == (0, ["a"])

    other.turn()
    worker.runners[FAKE].complete()
    worker.turn()
    other.runners[FAKE].complete()
    other.turn()

    assert steps(worker) == {"a": ["received", "started", "lost"]}
    assert steps(other) == {"a": ["received", "started", "ended"]}
    assert (fleet.status("a"), fleet.answers("a")) == ("SUCCESS", 1)


def test_the_engine_is_not_told_to_drop_a_request_that_has_come_back():
    """A worker that stood still may claim the same request again before it knows that it had lost it."""
    fleet = MemoryFleet(settings_of(FAKE))
    worker = fleet.worker(FAKE, slots=4)
    submit(fleet, "a")
    worker.turn()
    lapse(fleet, worker, worker)
    worker.turn()
    worker.tend()
    assert worker.runners[FAKE].aborted == []

    worker.runners[FAKE].complete()
    worker.turn()

    assert (fleet.status("a"), fleet.answers("a")) == ("SUCCESS", 1)
    told = [told for told in worker.witness.steps.values() if "received" in told]
    assert told == [["received", "started", "lost"], ["received", "started", "ended"]]


def test_a_lease_that_lapses_while_its_end_is_under_way_ends_once(fleet: MemoryFleet, worker: MemoryWorker):
    """What the broker wrote stands; what it did not write is not written by who has lost the lease."""
    submit(fleet, "a", "b")
    worker.turn()
    (run,) = worker.runners[FAKE].runs
    first, second = run.unreported
    worker.runners[FAKE].finish(run, first)
    worker.do(worker.loop.turn)
    worker.delivery.carry_out()
    lapse(fleet, worker, fleet.worker(FAKE))
    worker.runners[FAKE].finish(run, second)
    worker.do(worker.loop.turn)
    worker.tend()

    assert (fleet.status(first.id), fleet.status(second.id)) == ("SUCCESS", None)
    assert steps(worker) == {
        first.id: ["received", "started", "ended"], second.id: ["received", "started", "left"],
    }  # fmt: skip
    assert worker.in_flight == 0


@pytest.mark.parametrize("rests", [False, True])
def test_what_does_not_run_is_let_go_as_well(rests: bool):
    fleet = MemoryFleet(settings_of(FAKE, batcher={"adaptive_batching": False, "max_batch_size": 2 - rests}))
    worker, other = fleet.worker(FAKE), fleet.worker(FAKE)
    submit(fleet, "a")
    worker.turn()
    if rests:
        worker.runners[FAKE].complete(EngineBusy())
        worker.do(worker.loop.turn)
    (item,) = worker.intakes[FAKE].table
    assert item.state is (State.RESTING if rests else State.WAITING)
    lapse(fleet, worker, other)
    worker.tend()
    worker.do(worker.loop.turn)

    assert worker.in_flight == 0
    assert not worker.leases.held
    assert worker.witness.steps[item][-1] == "lost"


# -- a broker that fails ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("done", [False, True])
def test_an_end_that_is_lost_is_written_again(fleet: MemoryFleet, worker: MemoryWorker, done: bool):
    """The canvas is told once; where the end was written before, observers hear that the request left."""
    submit(fleet, "a")
    worker.turn()
    worker.runners[FAKE].complete()
    worker.delivery.failures.append(Failure(AWAY, done))
    assert not worker.turn()
    assert (worker.in_flight, fleet.status("a")) == (1, "SUCCESS" if done else None)

    worker.connect()
    worker.turn()

    assert (worker.in_flight, fleet.status("a"), fleet.answers("a")) == (0, "SUCCESS", 1)
    assert len(worker.canvas.told) == 1
    assert steps(worker)["a"][-1] == ("left" if done else "ended")


def test_what_the_engine_reports_while_the_broker_is_away_is_kept(fleet: MemoryFleet, worker: MemoryWorker):
    submit(fleet, "a", "b")
    worker.turn()
    worker.connected = False
    worker.runners[FAKE].complete()
    assert worker.in_flight == 2

    worker.connect()
    worker.turn()

    assert {fleet.status("a"), fleet.status("b")} == {"SUCCESS"}


# -- stop -------------------------------------------------------------------------------------------------------------


def test_a_worker_that_stops_gives_back_what_waits_in_its_order_and_ends_what_runs(fleet: MemoryFleet):
    fleet = MemoryFleet(settings_of(FAKE))
    worker = fleet.worker(FAKE, slots=4)
    submit(fleet, *"abcdefg")
    worker.turn()
    worker.begin_stop()
    assert not worker.wind_up()
    worker.runners[FAKE].complete()
    assert worker.wind_up()

    assert waiting(fleet) == ["f", "g"]
    assert all(fleet.status(name) == "SUCCESS" for name in "abcde")
    assert not worker.leases.held
    assert worker.intakes[FAKE].room() == 0


def test_what_does_not_end_in_time_goes_back_in_its_order(fleet: MemoryFleet, worker: MemoryWorker):
    submit(fleet, "a", "b", "c")
    worker.turn()
    worker.begin_stop()
    assert worker.wind_up(hurry=True)

    assert waiting(fleet) == ["a", "b", "c"]
    assert [item.id for item in worker.runners[FAKE].aborted] == ["a", "b"]
    worker.runners[FAKE].complete()
    assert worker.wind_up()
    assert fleet.status("a") is None


def test_what_a_claim_under_way_brings_while_the_worker_stops_goes_back(fleet: MemoryFleet, worker: MemoryWorker):
    submit(fleet, "a", "b")
    worker.do(lambda: worker.claim(FAKE))
    worker.intakes[FAKE].accepting = False
    worker.begin_stop()
    worker.wind_up(hurry=True)

    assert waiting(fleet) == ["a", "b"]
    assert fleet.broker.leases == {}


def test_a_stop_goes_on_when_the_broker_is_back(fleet: MemoryFleet, worker: MemoryWorker):
    submit(fleet, "a", "b", "c")
    worker.turn()
    worker.runners[FAKE].complete()
    worker.begin_stop()
    worker.delivery.failures.append(Failure(AWAY, done=False))
    assert not worker.wind_up()
    assert worker.in_flight == 2
    assert worker.wind_up()

    assert {fleet.status("a"), fleet.status("b")} == {"SUCCESS"}


@pytest.mark.parametrize("hurry", [False, True])
def test_a_request_that_rests_goes_back_when_the_worker_stops(fleet: MemoryFleet, worker: MemoryWorker, hurry: bool):
    submit(fleet, "a")
    worker.turn()
    worker.runners[FAKE].complete(EngineBusy())
    worker.turn()
    worker.begin_stop()
    assert worker.wind_up(hurry=hurry)

    assert waiting(fleet) == ["a"]


# -- what is not wanted any longer ------------------------------------------------------------------------------------


def test_what_runs_and_is_late_is_ended_and_the_engine_told(fleet: MemoryFleet, worker: MemoryWorker):
    fleet.submit("a", deadline=fleet.clock() + 1)
    worker.turn()
    worker.tend()
    assert fleet.status("a") is None

    fleet.pass_time(1)
    worker.tend()
    worker.turn()

    assert fleet.error("a").startswith("DeadlineExceeded")
    assert [item.id for item in worker.runners[FAKE].aborted] == ["a"]
    assert worker.intakes[FAKE].busy


def test_what_waits_and_was_cancelled_goes_with_the_next_claim(worker: MemoryWorker, fleet: MemoryFleet):
    worker.limits.replace(batcher={"adaptive_batching": False, "max_batch_size": 3, "batch_timeout_ms": 1e6})
    submit(fleet, "a", "b")
    worker.turn()
    fleet.cancel("a")
    submit(fleet, "c")
    worker.turn()

    assert (fleet.answers("a"), worker.in_flight) == (1, 2)


def test_a_cancellation_of_long_ago_costs_the_claims_after_it_nothing(
    worker: MemoryWorker, fleet: MemoryFleet, monkeypatch
):
    """It is remembered for an hour; what was sent since is not asked about."""
    asked = []
    monkeypatch.setattr(worker.delivery, "cancelled_among", lambda ids: asked.append(list(ids)) or set())
    worker.limits.replace(batcher={"adaptive_batching": False, "max_batch_size": 3, "batch_timeout_ms": 1e6})
    fleet.cancel("x")
    fleet.pass_time(CLOCKS_APART_SECONDS + 1)
    submit(fleet, "a")
    worker.turn()
    assert asked == []

    fleet.cancel("y")
    submit(fleet, "b")
    worker.turn()

    assert asked[0] == ["a", "b"]
