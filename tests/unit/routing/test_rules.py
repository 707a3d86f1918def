"""Where requests go whose worker is gone, whose queue nobody serves, or whose engine cannot answer them."""

from __future__ import annotations

from datetime import UTC, datetime

import orjson
import pytest

from shared import keys, wire
from shared.contract import EngineName, Hop
from shared.errors import BadRequest, EngineDied, EngineError, EngineOutage, NoEngineAvailable, UnknownModel
from tests.support.items import item_of
from tests.support.memory_worker import LEASE_SECONDS, MODEL, MemoryFleet, settings_of
from workers.requests.ending import End
from workers.requests.inflight import State
from workers.routing.fallback import PASS_ON_SECONDS, WAIT_SECONDS, Fallback, FallbackDecision, ending_of

FAKE, OTHER = EngineName.FAKE, EngineName.PYTORCH
LIST = keys.list_of("fake", 3)


@pytest.fixture
def fleet() -> MemoryFleet:
    return MemoryFleet(settings_of(FAKE, OTHER, max_deliveries=3, rescue_after_seconds=5.0))


def own_header(message: bytes) -> dict[str, object]:
    return wire.own_header(orjson.loads(message)["headers"])


# -- the sweeper ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deliveries", [0, 1, 2, 7])
def test_what_a_dead_worker_had_is_delivered_again_until_it_was_delivered_too_often(
    fleet: MemoryFleet, deliveries: int
):
    worker = fleet.worker(FAKE)
    fleet.submit("a", deliveries=deliveries)
    worker.delivery.claim("fake", 1)
    assert worker.sweeper.sweep() == LEASE_SECONDS
    fleet.pass_time(LEASE_SECONDS)
    worker.sweeper.sweep()

    waiting = fleet.broker.queues.waiting().get(LIST, [])
    if deliveries + 1 < 3:
        assert [own_header(message)["deliveries"] for message in waiting] == [deliveries + 1]
        assert fleet.status("a") is None
    else:
        assert (waiting, len(fleet.broker.dead)) == ([], 1)
        assert f"delivered {deliveries + 1} times" in fleet.broker.dead[0].reason
        assert fleet.error("a").startswith("DeadLettered")
    assert fleet.broker.leases == {}


@pytest.mark.parametrize("claimed", [-1000, 1, 2, 99])
def test_what_a_sender_says_of_deliveries_is_not_counted(fleet: MemoryFleet, claimed: int):
    """Neither for it nor against it, nor does it let its request run alone; three workers die, and no more."""
    worker = fleet.worker(FAKE)
    fleet.submit("a", headers={wire.HEADER: {"v": 1, "sent": fleet.clock(), "deliveries": claimed}})
    counted = []
    while fleet.status("a") is None:
        (message,) = worker.delivery.claim("fake", 1).messages
        counted.append(own_header(message.payload)["deliveries"])
        fleet.pass_time(LEASE_SECONDS)
        worker.sweeper.sweep()

    assert counted == [claimed, 1, 2]
    assert "delivered 3 times" in fleet.broker.dead[0].reason


def test_a_sender_cannot_have_a_request_run_alone(fleet: MemoryFleet):
    """That is for a request that may be what its workers died of."""
    worker = fleet.worker(FAKE)
    for name in ("a", "b"):
        fleet.submit(name, headers={wire.HEADER: {"v": 1, "sent": fleet.clock(), "deliveries": 2}})
    worker.turn()

    assert [item.deliveries for item in worker.intakes[FAKE].table] == [0, 0]
    assert worker.intakes[FAKE].table.count(State.ALONE) == 0


def test_max_deliveries_is_asked_for_each_time(fleet: MemoryFleet):
    worker = fleet.worker(FAKE)
    fleet.submit("a")
    worker.limits.replace(max_deliveries=1)
    worker.delivery.claim("fake", 1)
    fleet.pass_time(LEASE_SECONDS)
    worker.sweeper.sweep()

    assert fleet.error("a").startswith("DeadLettered")


def test_a_message_that_makes_no_sense_is_not_delivered_again(fleet: MemoryFleet):
    worker = fleet.worker(FAKE)
    fleet.broker.queues.push("fake", b"no JSON", front=False)
    worker.delivery.claim("fake", 1)
    fleet.pass_time(LEASE_SECONDS)
    worker.sweeper.sweep()

    assert [letter.message for letter in fleet.broker.dead] == [b"no JSON"]
    assert fleet.broker.leases == {}


def test_a_sweep_that_the_broker_interrupts_loses_nothing(fleet: MemoryFleet):
    """What it had taken over lapses like any lease, and no delivery is counted twice."""
    worker = fleet.worker(FAKE)
    fleet.submit("a")
    worker.delivery.claim("fake", 1)
    fleet.pass_time(LEASE_SECONDS)
    worker.canvas.failures.append(ConnectionError("away"))
    with pytest.raises(ConnectionError):
        worker.sweeper.sweep()
    fleet.pass_time(LEASE_SECONDS)
    worker.sweeper.sweep()

    (message,) = fleet.broker.queues.waiting()[LIST]
    assert own_header(message)["deliveries"] == 1


def ids_of(fleet: MemoryFleet, name: str = LIST) -> list[str]:
    """The requests on a list, in the order in which they are claimed."""
    return [orjson.loads(message)["headers"]["id"] for message in fleet.broker.queues.waiting().get(name, [])]


def test_what_a_dead_worker_had_comes_back_in_the_order_in_which_it_was_claimed(fleet: MemoryFleet):
    """In front of what has come since."""
    worker, names = fleet.worker(FAKE), [f"r{number}" for number in range(300)]
    for name in names:
        fleet.submit(name)
    worker.delivery.claim("fake", len(names))
    fleet.submit("younger")
    fleet.pass_time(LEASE_SECONDS)
    worker.sweeper.sweep()

    assert ids_of(fleet) == [*names, "younger"]


# -- the rescuer ------------------------------------------------------------------------------------------------------


def test_what_waits_where_nobody_serves_moves_on_after_a_time(fleet: MemoryFleet):
    worker = fleet.worker(OTHER)
    fleet.submit("a", FAKE)
    fleet.submit("late", FAKE, deadline=fleet.clock() + 3)
    assert worker.rescuer.look(0.0) == 0
    assert worker.rescuer.look(4.9) == 0
    fleet.pass_time(5)
    assert worker.rescuer.look(5.0) == 2

    (message,) = fleet.broker.queues.waiting()[keys.list_of("pytorch", 3)]
    (hop,) = own_header(message)["hops"]
    assert (hop["engine"], hop["error"], hop["outage"]) == ("fake", "no live worker serves the fake queue", True)
    assert fleet.error("late").startswith("DeadlineExceeded")


def test_what_moves_keeps_its_order_and_goes_before_what_is_younger(fleet: MemoryFleet):
    """However much it is, and however many workers there are to do it: one does."""
    workers, names = [fleet.worker(OTHER) for _ in range(3)], [f"r{number}" for number in range(300)]
    for name in names:
        fleet.submit(name, FAKE)
    fleet.submit("younger", OTHER)
    for worker in workers:
        worker.rescuer.look(0.0)

    assert [worker.rescuer.look(5.0) for worker in reversed(workers)] == [0, 0, 300]
    assert ids_of(fleet, keys.list_of("pytorch", 3)) == [*names, "younger"]


def test_what_cannot_be_moved_goes_back_where_it_was(fleet: MemoryFleet):
    worker, names = fleet.worker(OTHER), [f"r{number}" for number in range(5)]
    for name in names:
        fleet.submit(name, FAKE)
    worker.rescuer.look(0.0)
    worker.canvas.failures.append(ConnectionError("away"))
    with pytest.raises(ConnectionError):
        worker.rescuer.look(5.0)

    assert ids_of(fleet) == names
    assert fleet.broker.leases == {}


def test_a_queue_that_is_served_again_is_left_alone(fleet: MemoryFleet):
    """And the time begins anew when its worker goes."""
    worker = fleet.worker(OTHER)
    fleet.submit("a", FAKE)
    worker.rescuer.look(0.0)
    peer = fleet.worker(FAKE)
    worker.rescuer.look(6.0)
    peer.announced = False
    assert worker.rescuer.look(7.0) == 0
    assert worker.rescuer.look(11.9) == 0
    assert worker.rescuer.look(12.0) == 1


def test_how_long_a_queue_may_wait_is_asked_for_each_time(fleet: MemoryFleet):
    worker = fleet.worker(OTHER)
    worker.limits.replace(rescue_after_seconds=1.0)
    fleet.submit("a", FAKE)
    worker.rescuer.look(0.0)

    assert worker.rescuer.look(1.0) == 1


def test_where_no_engine_is_left_the_request_fails_or_waits_for_its_deadline(fleet: MemoryFleet):
    worker = fleet.worker(OTHER)
    worker.runners[OTHER].models.failed(MODEL, EngineDied())
    fleet.submit("a", FAKE)
    fleet.submit("b", FAKE, deadline=fleet.clock() + 60)
    worker.rescuer.look(0.0)
    worker.rescuer.look(5.0)

    assert fleet.error("a").startswith("NoEngineAvailable")
    assert fleet.status("b") is None
    assert [lease.expiry - fleet.broker.now for lease in fleet.broker.leases.values()] == [WAIT_SECONDS * 1000]


def test_a_message_that_makes_no_sense_is_refused(fleet: MemoryFleet):
    worker = fleet.worker(OTHER)
    fleet.broker.queues.push(keys.list_of("fake", 3), b"no JSON", front=False)
    worker.rescuer.look(0.0)
    worker.rescuer.look(5.0)

    assert [letter.message for letter in fleet.broker.dead] == [b"no JSON"]


# -- fallback ---------------------------------------------------------------------------------------------------------


def fallback(fleet: MemoryFleet, engine: EngineName = FAKE) -> Fallback:
    """That of the first worker."""
    worker = fleet.workers[0]
    return Fallback(
        engine, worker.runners[engine].models, fleet.settings, worker.name, fleet.live, lambda _: None, fleet.clock
    )


def test_an_engine_that_fails_is_followed_by_the_next_that_lives(fleet: MemoryFleet):
    fleet.worker(FAKE)
    fleet.worker(OTHER)
    error, request = EngineError("broke"), item_of().request

    assert fallback(fleet).after_failure(request, [], error) == FallbackDecision(OTHER, error)
    with pytest.raises(EngineError, match=r"pytorch: gone; fake: broke"):
        fallback(fleet).after_failure(request, [Hop(engine=OTHER, error="gone", time=1.0)], error)


def test_after_an_outage_the_same_engine_is_waited_for_within_the_deadline(fleet: MemoryFleet):
    fleet.worker(FAKE)
    error, now = EngineDied(), fleet.clock()

    patient = item_of(deadline=now + 60).request
    assert fallback(fleet).after_failure(patient, [], error) == FallbackDecision(FAKE, error)
    for request in (item_of().request, item_of(deadline=now + WAIT_SECONDS).request):
        with pytest.raises(EngineDied):
            fallback(fleet).after_failure(request, [], error)


def test_an_engine_that_was_out_twice_is_not_tried_again(fleet: MemoryFleet):
    fleet.worker(FAKE)
    fleet.worker(OTHER)
    before = [Hop(engine=OTHER, error="gone", time=1.0, outage=True)] * 2
    with pytest.raises(EngineDied):
        fallback(fleet).after_failure(item_of().request, before, EngineDied())


def test_what_cannot_be_served_here_goes_to_a_peer_before_it_goes_to_another_engine(fleet: MemoryFleet):
    fleet.worker(FAKE)
    fleet.worker(FAKE)
    fleet.worker(OTHER)
    fleet.workers[0].runners[FAKE].models.failed(MODEL, EngineDied())
    request = item_of().request

    assert fallback(fleet).elsewhere(request, [], 0.0) == FallbackDecision(None)
    fleet.workers[1].announced = False
    found = fallback(fleet).elsewhere(request, [], 0.0)
    assert (found.engine, type(found.error)) == (OTHER, EngineDied)


def test_a_refusal_says_what_is_wrong(fleet: MemoryFleet):
    fleet.worker(FAKE)
    with pytest.raises(UnknownModel, match="no model named 'none' is declared; there are: echo"):
        fallback(fleet).elsewhere(item_of(model="none").request, [], 0.0)
    with pytest.raises(BadRequest, match="does not serve classify requests"):
        fallback(fleet).elsewhere(item_of(kind="classify", inputs={"texts": ["x"]}).request, [], 0.0)
    fleet.workers[0].announced = False
    with pytest.raises(NoEngineAvailable):
        fallback(fleet).elsewhere(item_of().request, [], 0.0)


@pytest.mark.parametrize(("last", "due"), [(None, 100 + PASS_ON_SECONDS), (100.01, 100.01)])
def test_a_pause_is_not_longer_than_the_request_is_wanted(last: float | None, due: float):
    ending = ending_of(FallbackDecision(None), item_of(deadline=last), here=FAKE, now=100.0)

    assert (ending.end, ending.at) == (End.DELAY, due)


def test_a_hop_carries_what_failed():
    error = EngineOutage("gone")
    ending = ending_of(FallbackDecision(OTHER, error), item_of(), here=FAKE, now=100.0)

    assert (ending.end, ending.to, ending.here, ending.error, ending.at) == (End.HOP, OTHER, FAKE, error, 100.0)


# -- what is late -----------------------------------------------------------------------------------------------------


def test_what_waits_is_told_by_who_sweeps(fleet: MemoryFleet):
    """Our client's requests by their deadlines, others' by what is read of them; the engines that failed are named."""
    worker, now = fleet.worker(OTHER), fleet.clock()
    fleet.submit("ours", deadline=now + 3)
    fleet.submit("theirs", ours=False, deadline=now + 3)
    expires = datetime.fromtimestamp(now + 2, UTC).isoformat()
    fleet.submit("expiring", ours=False, headers={"expires": expires}, deadline=now + 3)
    fleet.submit("patient", ours=False)
    assert worker.sweeper.sweep() == 2.25
    fleet.pass_time(3.25)
    worker.sweeper.sweep(look=False)

    assert fleet.error("ours").startswith("DeadlineExceeded: The request's deadline passed")
    assert fleet.error("theirs").startswith("DeadlineExceeded")
    assert fleet.status("expiring") == "REVOKED"
    assert ids_of(fleet) == ["patient"]
    assert (fleet.broker.deadlines, fleet.broker.leases) == ({}, {})
    assert fleet.answers("ours") == 1


def test_what_a_dead_worker_had_is_not_delivered_again_when_it_is_late(fleet: MemoryFleet):
    worker = fleet.worker(FAKE)
    fleet.submit("a", deadline=fleet.clock() + 3)
    worker.delivery.claim("fake", 1)
    fleet.pass_time(LEASE_SECONDS)
    worker.sweeper.sweep()

    assert fleet.error("a").startswith("DeadlineExceeded")
    assert fleet.broker.deadlines == {}


def test_a_sender_that_asks_for_nonsense_is_told_by_who_claims(fleet: MemoryFleet):
    """A look passes over what has no time that it can read, and over what is no request at all."""
    worker = fleet.worker(OTHER)
    for number, expires in enumerate(["soon", [], -1e300]):
        fleet.submit(f"r{number}", ours=False, headers={"expires": expires})
    fleet.broker.queues.push(LIST, b"no JSON", front=False)
    worker.sweeper.sweep()

    assert fleet.broker.deadlines == {}
    assert len(fleet.broker.queues.waiting()[LIST]) == 4


def test_what_is_delayed_past_its_deadline_is_told_at_its_deadline(fleet: MemoryFleet):
    worker = fleet.worker(FAKE)
    eta = datetime.fromtimestamp(fleet.clock() + 60, UTC).isoformat()
    fleet.submit("a", headers={"eta": eta}, deadline=fleet.clock() + 2)
    worker.turn()
    fleet.pass_time(2.25)
    worker.sweeper.sweep()

    assert fleet.error("a").startswith("DeadlineExceeded")


@pytest.mark.parametrize("seen_first", [True, False])
def test_a_timeout_in_a_message_counts_from_when_the_fleet_first_saw_it(fleet: MemoryFleet, seen_first: bool):
    """Not anew with each claim: a deadline goes with it when it is given back or hops."""
    worker = fleet.worker(FAKE)
    worker.runners[FAKE].loaded.clear()
    fleet.submit("a", ours=False, timeout=4.0)
    began = fleet.clock()
    if seen_first:
        worker.sweeper.sweep()
    fleet.pass_time(1)
    worker.runners[FAKE].loaded.set()
    worker.turn()
    (item,) = worker.intakes[FAKE].table
    until = began + 4 + (0 if seen_first else 1)
    assert item.request is not None
    assert item.request.deadline == pytest.approx(until)
    worker.begin_stop()
    worker.wind_up(hurry=True)
    fleet.pass_time(1)
    again = fleet.worker(FAKE)
    again.turn()

    (item,) = again.intakes[FAKE].table
    assert item.request is not None
    assert item.request.deadline == pytest.approx(until)
    fleet.pass_time(3)
    again.tend()
    again.turn()
    assert fleet.error("a").startswith("DeadlineExceeded")
    assert fleet.broker.deadlines == {}
