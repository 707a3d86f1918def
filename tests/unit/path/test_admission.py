"""From a claimed message to a request that waits."""

from __future__ import annotations

from datetime import UTC, datetime

import orjson
import pytest

from shared import keys, wire
from shared.contract import EngineName
from shared.errors import EngineDied
from tests.support.memory_worker import MODEL, REPLY, MemoryFleet, MemoryWorker, settings_of
from workers.broker.memory import Failure
from workers.requests.inflight import State

FAKE, OTHER = EngineName.FAKE, EngineName.PYTORCH
AWAY = ConnectionError("the broker is away")


@pytest.fixture
def fleet() -> MemoryFleet:
    return MemoryFleet(settings_of(FAKE, OTHER))


@pytest.fixture
def worker(fleet: MemoryFleet) -> MemoryWorker:
    return fleet.worker(FAKE)


def push(fleet: MemoryFleet, body: object, **headers: object) -> None:
    """Put a message on the queue as it is."""
    envelope = {
        "body": body if isinstance(body, str) else orjson.dumps(body).decode(),
        "content-type": "application/json",
        "headers": {"task": "muai.infer", "id": "a", wire.HEADER: {"v": 1, "reply": REPLY}, **headers},
        "properties": {"priority": 3},
    }
    fleet.broker.queues.push(keys.list_of("fake", 3), orjson.dumps(envelope), front=False)


def states(worker: MemoryWorker) -> dict[str, State]:
    return {item.id: item.state for intake in worker.intakes.values() for item in intake.table}


def steps(worker: MemoryWorker) -> list[list[str]]:
    return list(worker.witness.steps.values())


@pytest.mark.parametrize("body", ["no JSON", "[1, 2]", [{}, {}, {}], [[], {}, {"chain": [3]}], [[], {}, {"chord": 1}]])
def test_a_message_whose_body_makes_no_sense_is_refused(fleet: MemoryFleet, worker: MemoryWorker, body: object):
    """Its sender is told, and it is kept among the dead letters."""
    push(fleet, body)
    worker.turn()

    assert fleet.error("a").startswith("UndecodableMessage")
    assert (len(fleet.broker.dead), fleet.answers("a"), worker.in_flight) == (1, 1, 0)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"request": {"model": MODEL}}, {"request": {"model": MODEL, "inputs": {"prompt": "x"}}, "more": 1}],
)
def test_a_request_that_is_not_valid_fails(fleet: MemoryFleet, worker: MemoryWorker, arguments: dict[str, object]):
    push(fleet, [[], arguments, {}])
    worker.turn()

    assert fleet.error("a").startswith("BadRequest")
    assert steps(worker) == [["received", "ended"]]


def test_what_is_larger_than_is_accepted_now_is_refused(fleet: MemoryFleet, worker: MemoryWorker):
    """A limit that is replaced while the worker runs."""
    worker.limits.replace(max_payload_bytes=100)
    fleet.submit("a", inputs={"prompt": "x" * 200})
    worker.turn()

    assert fleet.error("a").startswith("PayloadTooLarge")


def test_a_message_whose_time_has_not_come_waits_in_the_broker(fleet: MemoryFleet, worker: MemoryWorker):
    when = datetime.fromtimestamp(fleet.clock() + 5, UTC).isoformat()
    fleet.submit("a", headers={"eta": when})
    worker.turn()
    assert (worker.in_flight, [lease.expiry for lease in fleet.broker.leases.values()]) == (
        0, [int(fleet.clock() * 1000) + 5000],
    )  # fmt: skip

    fleet.pass_time(5)
    worker.sweeper.sweep()
    worker.turn()

    assert states(worker) == {"a": State.RUNNING}


@pytest.mark.parametrize("headers", [{"eta": "soon"}, {"expires": "soon"}, {"eta": 1e300}])
def test_a_time_that_is_none_is_the_senders_error(fleet: MemoryFleet, worker: MemoryWorker, headers: dict[str, object]):
    fleet.submit("a", headers=headers)
    worker.turn()

    assert fleet.error("a").startswith("BadRequest: eta and expires")


def test_a_request_whose_model_rests_here_goes_to_another_engine(fleet: MemoryFleet, worker: MemoryWorker):
    other = fleet.worker(OTHER)
    worker.runners[FAKE].models.failed(MODEL, EngineDied())
    fleet.submit("a")
    worker.turn()
    other.turn()

    assert (states(worker), states(other)) == ({}, {"a": State.RUNNING})


def test_a_request_whose_model_rests_here_is_left_to_a_peer(fleet: MemoryFleet, worker: MemoryWorker):
    """It is delayed for a moment, so that it does not come straight back."""
    fleet.worker(FAKE)
    worker.runners[FAKE].models.failed(MODEL, EngineDied())
    fleet.submit("a")
    worker.turn()

    assert [ending.end for ending in worker.witness.endings] == ["delay"]


def test_a_lease_is_kept_no_longer_than_the_request_is_wanted(fleet: MemoryFleet, worker: MemoryWorker):
    """It may run past its ``expires``."""
    deadline, expires = fleet.clock() + 60, datetime.fromtimestamp(fleet.clock() + 30, UTC).isoformat()
    fleet.submit("a", deadline=deadline, headers={"expires": expires})
    worker.turn()

    assert list(worker.leases.held.values()) == [deadline]


# -- messages of other senders ----------------------------------------------------------------------------------------


def test_a_second_message_of_an_id_waits_and_ends_with_the_firsts_answer(fleet: MemoryFleet):
    worker = fleet.worker(FAKE, slots=4)
    fleet.submit("a", ours=False)
    worker.turn()
    fleet.submit("a", ours=False)
    worker.turn()
    assert [ending.end for ending in worker.witness.endings] == ["delay"]

    worker.runners[FAKE].complete()
    worker.turn()
    fleet.pass_time(1.1)
    worker.sweeper.sweep()
    worker.turn()

    assert [ending.end for ending in worker.witness.endings] == ["delay", "result", "duplicate"]
    assert (fleet.status("a"), fleet.broker.leases) == ("SUCCESS", {})


def test_a_message_whose_id_was_cancelled_before_ends_as_cancelled(fleet: MemoryFleet, worker: MemoryWorker):
    """It has its record, but the rest of its canvas is told."""
    fleet.cancel("a")
    fleet.submit("a", ours=False)
    worker.turn()

    assert [ending.end for ending in worker.canvas.told] == ["cancel"]
    assert (fleet.status("a"), fleet.answers("a")) == ("REVOKED", 1)


# -- a broker that fails ----------------------------------------------------------------------------------------------


def test_an_admission_that_the_broker_interrupts_goes_on_when_it_is_back(fleet: MemoryFleet, worker: MemoryWorker):
    """What was claimed with it is received all the same, and observers hear of each once."""
    fleet.worker(FAKE)
    worker.runners[FAKE].models.failed(MODEL, EngineDied())
    worker.refresh_failures.extend([AWAY] * 3)
    for name in ("a", "b"):
        fleet.submit(name)
    assert not worker.turn()
    assert states(worker) == {"a": State.CLAIMED, "b": State.CLAIMED}

    worker.connect()
    worker.turn()

    assert states(worker) == {}
    assert steps(worker) == [["received", "ended"], ["received", "ended"]]


@pytest.mark.parametrize("done", [False, True])
def test_a_question_that_the_broker_did_not_answer_is_asked_again(fleet: MemoryFleet, worker: MemoryWorker, done: bool):
    """Whether it has noted that the message runs, or not."""
    fleet.submit("a", ours=False)
    worker.do(lambda: worker.claim(FAKE))
    worker.delivery.carry_out()
    begin, asked = fleet.broker.begin, []

    def fail_once(messages: list[tuple[str, str]]) -> object:
        asked.append(messages)
        if len(asked) == 1:
            if done:
                begin(messages)
            raise AWAY
        return begin(messages)

    fleet.broker.begin = fail_once
    assert not worker.do(worker.delivery.answer)
    assert states(worker) == {"a": State.ASKING}

    worker.connect()
    worker.turn()

    assert states(worker) == {"a": State.RUNNING}
    assert len(asked) == 2


def test_a_claim_whose_answer_is_lost_comes_back_with_its_leases(fleet: MemoryFleet, worker: MemoryWorker):
    fleet.submit("a")
    worker.delivery.failures.append(Failure(AWAY, done=True))
    assert not worker.turn()
    assert (worker.in_flight, len(fleet.broker.leases)) == (0, 1)

    worker.connect()
    fleet.pass_time(10.1)
    worker.sweeper.sweep()
    worker.turn()

    (item,) = worker.intakes[FAKE].table
    assert (item.id, item.deliveries) == ("a", 1)
