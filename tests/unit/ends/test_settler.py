"""One way to end: the canvas is told, then all is written, then the observers hear; and nothing is told twice."""

from __future__ import annotations

import pytest
from kombu.exceptions import OperationalError

from shared import wire
from shared.contract import EngineName
from shared.errors import BadRequest, EngineError
from tests.support.memory_worker import MemoryFleet, MemoryWorker, settings_of
from workers.broker.memory import Failure
from workers.ends.outbox import AT_ONCE, Outbox
from workers.requests.ending import Ending
from workers.requests.inflight import InFlight, State
from workers.requests.table import RequestTable

AWAY = ConnectionError("the broker is away")


@pytest.fixture
def fleet() -> MemoryFleet:
    return MemoryFleet(settings_of(EngineName.FAKE))


@pytest.fixture
def worker(fleet: MemoryFleet) -> MemoryWorker:
    return fleet.worker(EngineName.FAKE)


@pytest.fixture
def table() -> RequestTable:
    return RequestTable()


@pytest.fixture
def outbox(worker: MemoryWorker, table: RequestTable) -> Outbox:
    return Outbox(worker.settler, table)


def claimed(fleet: MemoryFleet, worker: MemoryWorker, *names: str) -> list[InFlight]:
    """Requests that this worker has leased and holds."""
    for name in names:
        fleet.submit(name)
    items = []
    for message in worker.delivery.claim("fake", len(names)).messages:
        envelope = wire.decode_envelope(message.payload)
        items.append(
            InFlight(message.lease, "fake", envelope["headers"], envelope["properties"], envelope["body"], 0.0)
        )
        worker.leases.hold(message.lease)
    return items


def answered(item: InFlight) -> Ending:
    return Ending.answered(item, {}, b"{}", 0.1)


# -- the settler ------------------------------------------------------------------------------------------------------


def test_the_canvas_is_told_first_then_it_is_written_then_the_observers_hear(fleet, worker, monkeypatch):
    order: list[str] = []
    settle = fleet.broker.settle
    monkeypatch.setattr(worker.canvas, "tell", lambda ending: order.append("canvas") or [])
    monkeypatch.setattr(fleet.broker, "settle", lambda found: order.append("written") or settle(found))
    monkeypatch.setattr(worker.witness, "request_ended", lambda ending: order.append("observers"))
    worker.observers._listeners["request_ended"] = (worker.witness.request_ended,)
    (item,) = claimed(fleet, worker, "a")

    worker.settler.end([answered(item)])

    assert order == ["canvas", "written", "observers"]
    assert worker.leases.held == {}


@pytest.mark.parametrize("error", [AWAY, OperationalError("the broker is away")])
def test_where_the_canvas_cannot_be_told_for_the_broker_nothing_is_written(fleet, worker, error):
    """It is decided when the broker is back."""
    (item,) = claimed(fleet, worker, "a")
    worker.canvas.failures.append(error)

    with pytest.raises(ConnectionError):
        worker.settler.end([answered(item)])

    assert (fleet.status("a"), list(worker.leases.held)) == (None, [item.lease])
    worker.settler.end([answered(item)])
    assert fleet.status("a") == "SUCCESS"


def test_a_result_whose_canvas_cannot_be_continued_is_a_failure(fleet, worker):
    """Whose text quotes nothing."""
    (item,) = claimed(fleet, worker, "a")
    worker.canvas.failures.append(TypeError("secret"))
    worker.settler.end([answered(item)])

    assert "cannot be written: TypeError" in fleet.error("a")
    assert "secret" not in fleet.error("a")
    assert [ending.end for ending in worker.canvas.told] == ["failure"]


def test_a_failure_is_written_where_its_canvas_cannot_be_told(fleet, worker):
    (item,) = claimed(fleet, worker, "a")
    worker.canvas.failures.append(TypeError("secret"))
    worker.settler.end([Ending.failed(item, BadRequest("no"))])

    assert fleet.error("a") == "BadRequest: no"


def test_what_stands_is_what_the_observers_are_told_of(fleet, worker):
    """A cancellation that came before, an answer that was there, a lease that is lost."""
    cancelled, lost, good = claimed(fleet, worker, "a", "b", "c")
    fleet.cancel("a")
    fleet.broker.leases.pop(lost.lease)
    written = worker.settler.end([answered(item) for item in (cancelled, lost, good)])

    assert [came.name for came in written] == ["CANCELLED", "LOST", "DONE"]
    assert [ending.end for ending in worker.witness.endings] == ["cancel", "result"]
    assert worker.witness.steps[lost] == ["left"]


def test_off_the_loop_the_observers_are_told_when_the_loop_looks(fleet, worker):
    (item,) = claimed(fleet, worker, "a")
    worker.settler.end([answered(item)], on_loop=False)
    assert not worker.witness.steps

    worker.observers.deliver()
    assert worker.witness.steps[item] == ["ended"]


# -- the outbox -------------------------------------------------------------------------------------------------------


def entered(table: RequestTable, items: list[InFlight]) -> list[InFlight]:
    for item in items:
        table.enter(item)
    return items


def test_ends_are_gathered_and_written_together(fleet, worker, outbox, table):
    items = entered(table, claimed(fleet, worker, *[f"r{number}" for number in range(AT_ONCE + 1)]))
    for item in items:
        outbox.add(answered(item))
    assert table.count(State.ENDED) == AT_ONCE + 1

    outbox.flush()
    assert worker.delivery.under_way == 2
    worker.delivery.wait()

    assert len(table) == 0
    assert len(worker.witness.endings) == AT_ONCE + 1


def test_a_request_ends_once(fleet, worker, outbox, table):
    (item,) = entered(table, claimed(fleet, worker, "a"))
    outbox.add(answered(item))

    with pytest.raises(RuntimeError, match="that is ended cannot become ended"):
        outbox.add(answered(item))


@pytest.mark.parametrize("done", [False, True])
def test_what_is_lost_is_written_again_in_its_order_and_told_once(fleet, worker, outbox, table, done):
    items = entered(table, claimed(fleet, worker, "a", "b", "c"))
    for item in items[:2]:
        outbox.add(answered(item))
    outbox.flush()
    outbox.add(answered(items[2]))
    worker.delivery.failures.append(Failure(AWAY, done))
    with pytest.raises(ConnectionError):
        outbox.flush()
    assert table.count(State.ENDED) == 3

    outbox.flush(wait=True)

    assert len(table) == 0
    assert [ending.item.id for ending in worker.canvas.told] == ["a", "b", "c"]
    assert [key for key, _ in fleet.broker.published] == [f"celery-task-meta-{name}" for name in "abc"]


def test_one_whose_canvas_cannot_be_told_keeps_no_other_from_its_end(fleet, worker, outbox, table):
    """A broker that takes no more messages still writes records: the others are written, and the loop goes on."""
    items = entered(table, claimed(fleet, worker, "a", "b", "c", "d"))
    for item, embed in zip(items, [{}, {"chain": [{}]}, {}, {"chain": [{}]}], strict=True):
        item.embed = embed
        outbox.add(answered(item))
    tell, told = worker.canvas.tell, []

    def fail_for_b(ending: Ending) -> object:
        told.append(ending.item.id)
        if ending.item.id == "b":
            raise AWAY
        return tell(ending)

    worker.canvas.tell = fail_for_b
    outbox.flush(wait=True)
    assert [fleet.status(name) for name in "abcd"] == ["SUCCESS", None, "SUCCESS", None]
    assert told == ["a", "b", "c"]  # d would have waited for the broker as long as b

    for _ in range(2):
        outbox.tell_again()
        worker.delivery.wait()
    assert [fleet.status(name) for name in "abcd"] == ["SUCCESS", None, "SUCCESS", None]
    worker.canvas.tell = tell
    outbox.tell_again()
    worker.delivery.wait()
    assert [fleet.status(name) for name in "abcd"] == ["SUCCESS"] * 4
    assert len(table) == 0


def test_an_end_that_was_decided_while_the_broker_was_away_is_not_forgotten(fleet, worker, outbox, table):
    (item,) = entered(table, claimed(fleet, worker, "a"))
    worker.canvas.failures.append(AWAY)
    outbox.add(Ending.failed(item, EngineError("broke")))
    outbox.flush(wait=True)
    assert fleet.status("a") is None

    outbox.tell_again()
    worker.delivery.wait()
    assert fleet.error("a") == "EngineError: broke"


def test_what_goes_back_waits_for_no_canvas(fleet, worker, outbox, table):
    """Nobody is told that a request goes back: it is in its queue before what may kill the worker runs alone."""
    first, second = entered(table, claimed(fleet, worker, "a", "b"))
    worker.canvas.failures.append(AWAY)
    outbox.add(answered(first))
    outbox.add(Ending.given_back(second))

    outbox.flush(wait=True)

    assert [item.id for item in table] == ["a"]
