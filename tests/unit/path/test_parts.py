"""Requests with more rows than a batch holds: they run in parts, with others between, and end as one."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from shared import keys
from shared.contract import EngineName, InferenceRequest
from shared.errors import BadRequest, Cancelled, EngineBusy, EngineError
from tests.support.memory_worker import LEASE_SECONDS, MODEL, MemoryFleet, MemoryWorker, settings_of
from tests.support.scripted import Run
from workers.engines.base import EngineOutput
from workers.engines.fake import answer
from workers.requests.inflight import State

FAKE = EngineName.FAKE
LIST = "fake\x06\x163"
TEXTS = [f"{'x' * (number % 7)}{number}" for number in range(10)]


@pytest.fixture
def fleet() -> MemoryFleet:
    return MemoryFleet(settings_of(FAKE, batcher={"max_batch_size": 4}, max_deliveries=3, max_result_bytes=2500))


@pytest.fixture
def worker(fleet: MemoryFleet) -> MemoryWorker:
    return fleet.worker(FAKE)


def submit(fleet: MemoryFleet, name: str, texts: list[str] = TEXTS, **fields: Any) -> None:
    fleet.submit(name, kind="embed", inputs={"texts": texts}, **fields)


def runs(worker: MemoryWorker) -> list[Run]:
    return worker.runners[FAKE].runs


def running(worker: MemoryWorker) -> list[dict[str, int]]:
    """The batches in the engine's hands: how many rows of each request."""
    return [{part.id: len(part) for part in run.batch.items} for run in runs(worker)]


def go_on(worker: MemoryWorker) -> None:
    """The engine answers what it has."""
    worker.runners[FAKE].complete()
    worker.turn()


def outputs(fleet: MemoryFleet, name: str) -> dict[str, Any]:
    found: dict[str, Any] = orjson.loads(fleet.broker.records[keys.result_key(name)])["result"]
    return found


def expected(texts: list[str] = TEXTS) -> dict[str, Any]:
    whole = answer(InferenceRequest.parse({"model": MODEL, "kind": "embed", "inputs": {"texts": texts}}))
    assert isinstance(whole, EngineOutput)
    return whole.outputs


def waiting(fleet: MemoryFleet) -> list[str]:
    return [orjson.loads(message)["headers"]["id"] for message in fleet.broker.queues.waiting().get(LIST, [])]


def test_a_request_runs_in_parts_and_is_answered_as_one(fleet: MemoryFleet, worker: MemoryWorker):
    """Observers are told of one request that was started once."""
    submit(fleet, "a")
    worker.turn()
    sizes = []
    while runs(worker):
        sizes += running(worker)
        assert fleet.status("a") is None
        go_on(worker)

    assert sizes == [{"a": 4}, {"a": 4}, {"a": 2}]
    result = outputs(fleet, "a")
    assert result["outputs"] == expected()
    assert result["metadata"]["timing"]["engine_ms"] == 30.0
    assert list(worker.witness.steps.values()) == [["received", "started", "ended"]]
    assert worker.in_flight == 0


def test_others_run_between_the_parts(fleet: MemoryFleet, worker: MemoryWorker):
    """What comes while a part runs is in the next batch, whether the part's end was foreseen or not."""
    worker.loop.on_tick = lambda: worker.claim(FAKE)
    submit(fleet, "a")
    worker.turn()
    submit(fleet, "b", ["one"])
    submit(fleet, "c", ["one", "two"])
    go_on(worker)

    assert {"a", "b"} <= set().union(*running(worker))
    assert sum(running(worker)[0].values()) <= 4
    go_on(worker)
    go_on(worker)
    assert {fleet.status("b"), fleet.status("c")} == {"SUCCESS"}
    while runs(worker):
        go_on(worker)
    assert outputs(fleet, "a")["outputs"] == expected()
    assert outputs(fleet, "c")["outputs"] == expected(["one", "two"])


def test_others_that_share_no_batch_with_it_run_between_too(fleet: MemoryFleet, worker: MemoryWorker):
    worker.loop.on_tick = lambda: worker.claim(FAKE)
    submit(fleet, "a")
    worker.turn()
    fleet.submit("b")
    go_on(worker)
    assert running(worker) == [{"b": 1}]

    fleet.submit("c")
    go_on(worker)
    assert running(worker) == [{"a": 4}]
    go_on(worker)

    assert running(worker) == [{"c": 1}]


def test_what_fails_in_one_part_fails_its_request_only(fleet: MemoryFleet, worker: MemoryWorker):
    """Nothing more of it runs."""
    submit(fleet, "a")
    submit(fleet, "b", TEXTS[:2])
    worker.turn()
    (run,) = runs(worker)
    for part in list(run.unreported):
        worker.runners[FAKE].finish(run, part, *[BadRequest("too long")] * (part.id == "a"))
    worker.runners[FAKE].end(run)
    worker.turn()

    assert fleet.error("a") == "BadRequest: too long"
    assert outputs(fleet, "b")["outputs"] == expected(TEXTS[:2])
    assert (runs(worker), worker.in_flight) == ([], 0)


@pytest.mark.parametrize("why", ["cancelled", "late", "revoked"])
def test_what_is_not_wanted_ends_between_its_parts(fleet: MemoryFleet, worker: MemoryWorker, why: str):
    """As within them: the engine is told, and what it still says is passed over."""
    submit(fleet, "a", deadline=fleet.clock() + 5)
    worker.turn()
    go_on(worker)
    if why == "cancelled":
        fleet.cancel("a")
    elif why == "revoked":
        worker.revoked.add("a")
    else:
        fleet.pass_time(5)
    worker.tend()
    assert [item.id for item in worker.runners[FAKE].aborted] == ["a"]

    go_on(worker)

    assert fleet.status("a") == ("FAILURE" if why == "late" else "REVOKED")
    assert (runs(worker), worker.in_flight, fleet.answers("a")) == ([], 0, 1)


def test_a_passing_error_begins_it_anew(fleet: MemoryFleet):
    """What else runs of it is not wanted then."""
    worker = fleet.worker(FAKE, slots=3)
    submit(fleet, "a")
    worker.turn()
    first, *others = list(runs(worker))
    worker.runners[FAKE].finish(first, first.unreported[0], EngineBusy())
    worker.runners[FAKE].end(first)
    worker.turn()
    (item,) = worker.intakes[FAKE].table
    assert item.state is State.RESTING
    assert all(run.aborted == set(run.unreported) for run in others)

    fleet.pass_time(1)
    worker.turn()
    for run in others:
        worker.runners[FAKE].finish(run, run.unreported[0], Cancelled())
        worker.runners[FAKE].end(run)
    worker.turn()
    while runs(worker):
        go_on(worker)

    assert outputs(fleet, "a")["outputs"] == expected()


def test_an_answer_that_will_be_too_long_fails_when_that_is_known(fleet: MemoryFleet, worker: MemoryWorker):
    submit(fleet, "a", TEXTS * 3)
    worker.turn()
    go_on(worker)

    assert fleet.error("a").startswith("AnswerTooLarge: the answer will be about ")
    go_on(worker)
    assert (runs(worker), worker.in_flight) == ([], 0)


def test_an_engine_that_batches_by_itself_is_given_rows(fleet: MemoryFleet):
    """Others are claimed beside them, and have the next places."""
    worker = fleet.worker(FAKE, slots=3)
    submit(fleet, "a")
    worker.turn()
    assert running(worker) == [{"a": 1}] * 3
    fleet.submit("b")
    worker.turn()
    assert waiting(fleet) == []

    run = runs(worker)[0]
    worker.runners[FAKE].finish(run, run.unreported[0])
    worker.runners[FAKE].end(run)
    worker.turn()
    run = runs(worker)[0]
    worker.runners[FAKE].finish(run, run.unreported[0])
    worker.runners[FAKE].end(run)
    worker.turn()

    assert {"b": 1} in running(worker)
    while runs(worker):
        go_on(worker)
    assert outputs(fleet, "a")["outputs"] == expected()


def test_what_has_not_begun_is_left_to_a_peer(fleet: MemoryFleet, worker: MemoryWorker):
    other = fleet.worker(FAKE)
    submit(fleet, "a")
    submit(fleet, "b")
    worker.turn()
    other.turn()

    assert (running(worker), running(other)) == ([{"a": 4}], [{"b": 4}])


def test_the_last_try_is_made_alone_in_parts(fleet: MemoryFleet, worker: MemoryWorker):
    submit(fleet, "a", deliveries=2)
    fleet.submit("b")
    worker.turn()
    sizes = []
    for _ in range(3):
        assert waiting(fleet) == ["b"]
        sizes += running(worker)
        go_on(worker)

    assert sizes == [{"a": 4}, {"a": 4}, {"a": 2}]
    assert fleet.status("a") == "SUCCESS"
    assert running(worker) == [{"b": 1}]


def test_what_has_begun_ends_before_the_last_try_of_another(fleet: MemoryFleet, worker: MemoryWorker):
    worker.loop.on_tick = lambda: worker.claim(FAKE)
    submit(fleet, "a")
    worker.turn()
    fleet.submit("b", deliveries=2)
    sizes = []
    while "b" not in set().union(*running(worker)):
        sizes += running(worker)
        go_on(worker)

    assert sizes == [{"a": 4}, {"a": 4}, {"a": 2}]
    assert fleet.status("a") == "SUCCESS"


@pytest.mark.parametrize("hurry", [False, True])
def test_a_worker_that_stops_ends_what_has_begun_or_gives_it_back(
    fleet: MemoryFleet, worker: MemoryWorker, hurry: bool
):
    submit(fleet, "a")
    worker.turn()
    worker.runners[FAKE].complete()
    worker.begin_stop()
    while not worker.wind_up(hurry=hurry):
        worker.runners[FAKE].complete()

    assert fleet.status("a") == (None if hurry else "SUCCESS")
    assert waiting(fleet) == ["a"] * hurry
    assert worker.in_flight == 0


def test_what_others_have_taken_over_runs_no_further(fleet: MemoryFleet, worker: MemoryWorker):
    submit(fleet, "a")
    worker.turn()
    fleet.pass_time(LEASE_SECONDS + 1, [worker])
    fleet.worker(FAKE).sweeper.sweep()
    worker.leases.keep()
    worker.tend()
    worker.runners[FAKE].complete()
    worker.do(worker.loop.turn)

    assert (runs(worker), worker.in_flight) == ([], 0)


def test_a_request_whose_part_fails_goes_to_the_next_engine_whole():
    fleet = MemoryFleet(settings_of(FAKE, EngineName.ONNX, batcher={"max_batch_size": 4}))
    worker, other = fleet.worker(FAKE), fleet.worker(EngineName.ONNX)
    submit(fleet, "a")
    worker.turn()
    go_on(worker)
    worker.runners[FAKE].complete(EngineError("broke"))
    worker.turn()
    other.turn()

    assert (runs(worker), worker.in_flight) == ([], 0)
    while other.runners[EngineName.ONNX].runs:
        other.runners[EngineName.ONNX].complete()
        other.turn()
    assert outputs(fleet, "a")["outputs"] == expected()
