"""What becomes of a request that the engine has reported on."""

from __future__ import annotations

from itertools import pairwise

import pytest

from shared.contract import EngineName
from shared.errors import BadRequest, EngineBusy, EngineDied, EngineError
from tests.support.memory_worker import MemoryFleet, MemoryWorker, settings_of
from tests.support.scripted import ANSWER

FAKE, OTHER = EngineName.FAKE, EngineName.PYTORCH


def start(*engines: EngineName, **limits: object) -> tuple[MemoryFleet, MemoryWorker]:
    fleet = MemoryFleet(settings_of(*engines, **limits))
    return fleet, fleet.worker(*engines)


def report(worker: MemoryWorker, outcome: object, engine: EngineName = FAKE) -> None:
    """The engine says this of everything that it has."""
    worker.runners[engine].complete(outcome)
    worker.turn()


@pytest.mark.parametrize("attempts", [0, 1, 3])
def test_a_passing_error_is_tried_again_so_many_times_with_growing_pauses(attempts: int):
    """``retry.attempts`` times, each pause double the one before; then it is an error like any other."""
    fleet, worker = start(FAKE, retry={"attempts": attempts, "backoff_ms": 100.0})
    fleet.submit("a")
    worker.turn()
    runner, tries = worker.runners[FAKE], [fleet.clock()]
    report(worker, EngineBusy())
    while len(tries) <= 10 and fleet.status("a") is None:
        fleet.pass_time(0.05)
        worker.turn()
        if runner.runs:
            tries.append(fleet.clock())
            report(worker, EngineBusy())

    pauses = [round(after - before, 2) for before, after in pairwise(tries)]
    assert pauses == [0.1 * 2**number for number in range(attempts)]
    assert fleet.error("a").startswith("EngineBusy")


def test_a_request_that_is_answered_after_a_passing_error():
    fleet, worker = start(FAKE)
    fleet.submit("a")
    worker.turn()
    report(worker, EngineBusy())
    fleet.pass_time(0.1)
    worker.turn()
    report(worker, ANSWER)

    assert fleet.status("a") == "SUCCESS"
    assert list(worker.witness.steps.values()) == [["received", "started", "started", "ended"]]


def test_there_is_no_pause_past_the_last_moment():
    """A request whose deadline comes before the next try has had its chance."""
    fleet, worker = start(FAKE, retry={"attempts": 5, "backoff_ms": 1000.0})
    fleet.submit("a", deadline=fleet.clock() + 0.9)
    worker.turn()
    report(worker, EngineBusy())

    assert fleet.error("a").startswith("EngineBusy")


@pytest.mark.parametrize(
    ("outcome", "status"), [(EngineError("broke"), "RETRY"), (EngineDied(), "RETRY"), (BadRequest("no"), "FAILURE")]
)
def test_an_engines_error_hops_and_a_callers_error_does_not(outcome: Exception, status: str):
    fleet, worker = start(FAKE, OTHER)
    fleet.submit("a")
    worker.turn()
    report(worker, outcome)

    assert fleet.status("a") == status
    assert len(worker.runners[OTHER].runs) == (status == "RETRY")


def test_a_request_that_was_cancelled_and_hops_is_ended_where_it_comes_to():
    """So its caller and the rest of its canvas get an end."""
    fleet, worker = start(FAKE, OTHER)
    fleet.submit("a")
    worker.turn()
    fleet.cancel("a")
    report(worker, EngineError("broke"))

    assert (fleet.status("a"), fleet.answers("a")) == ("REVOKED", 1)
    assert [ending.end for ending in worker.canvas.told] == ["hop", "cancel"]
    assert worker.runners[OTHER].submitted == []


def test_the_history_of_hops_is_in_the_answer_and_in_the_last_error():
    fleet, worker = start(FAKE, OTHER)
    for name in ("a", "b"):
        fleet.submit(name)
    worker.turn()
    report(worker, EngineError("broke"))
    (run,) = worker.runners[OTHER].runs
    first, second = run.unreported
    worker.runners[OTHER].finish(run, first)
    worker.runners[OTHER].finish(run, second, EngineError("broke too"))
    worker.runners[OTHER].end(run)
    worker.turn()

    hops = [ending.result["metadata"]["hops"] for ending in worker.witness.endings if ending.result]
    assert [(hop["engine"], hop["error"]) for hop in hops[0]] == [("fake", "broke")]
    assert "fake: broke; pytorch: broke too" in fleet.error(second.id)


def test_without_fallback_an_engines_error_is_the_callers():
    """A limit that is replaced while the worker runs."""
    fleet, worker = start(FAKE, OTHER)
    fleet.submit("a")
    worker.turn()
    worker.limits.replace(fallback_on_error=False)
    report(worker, EngineError("broke"))

    assert fleet.error("a") == "EngineError: broke"


def test_an_answer_that_is_too_large_is_an_error():
    fleet, worker = start(FAKE)
    worker.limits.replace(max_result_bytes=10)
    fleet.submit("a")
    worker.turn()
    report(worker, ANSWER)

    assert fleet.error("a").startswith("AnswerTooLarge")


def test_an_answer_that_is_no_json_is_that_requests_failure():
    fleet, worker = start(FAKE)
    fleet.submit("a")
    worker.turn()
    report(worker, type(ANSWER)({"text": object()}))

    assert "cannot be written: TypeError" in fleet.error("a")


@pytest.mark.parametrize("outcome", [EngineBusy(), EngineDied()])
def test_what_says_nothing_of_the_request_goes_back_while_the_worker_stops(outcome: Exception):
    fleet, worker = start(FAKE)
    fleet.submit("a")
    worker.turn()
    worker.begin_stop()
    worker.runners[FAKE].complete(outcome)
    assert worker.wind_up()

    assert fleet.status("a") is None
    assert len(fleet.broker.queues.waiting()["fake\x06\x163"]) == 1


def test_a_report_of_a_request_that_has_ended_is_not_wanted():
    """It was cancelled while it ran: the late answer changes nothing."""
    fleet, worker = start(FAKE)
    fleet.submit("a")
    worker.turn()
    fleet.cancel("a")
    worker.tend()
    report(worker, ANSWER)

    assert (fleet.status("a"), fleet.answers("a")) == ("REVOKED", 1)
    assert [ending.end for ending in worker.witness.endings] == ["cancel"]
    assert [item.id for item in worker.runners[FAKE].aborted] == ["a"]
    assert worker.in_flight == 0
