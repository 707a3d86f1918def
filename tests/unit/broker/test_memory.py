"""The delivery in memory fails when it is told to, and answers when it is told to."""

from __future__ import annotations

import pytest

from shared.settings import FleetSettings
from tests.support.clock import ManualClock
from workers.broker.delivery import Claim, Settlement, Written
from workers.broker.memory import Failure, MemoryDelivery, MemoryLeases
from workers.broker.memory_broker import MemoryBroker

FLEET = FleetSettings(lease_seconds=10.0)
AWAY = ConnectionError("the broker is away")


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def broker(clock: ManualClock) -> MemoryBroker:
    return MemoryBroker(clock)


@pytest.fixture
def delivery(broker: MemoryBroker) -> MemoryDelivery:
    return MemoryDelivery(broker, FLEET)


def claim_one(broker: MemoryBroker, delivery: MemoryDelivery) -> str:
    broker.submit("fake", "a", b"message")
    (message,) = delivery.claim("fake", 1).messages
    return message.lease


@pytest.mark.parametrize("done", [False, True])
def test_a_command_fails_once_before_or_after_it_was_carried_out(
    broker: MemoryBroker, delivery: MemoryDelivery, done: bool
):
    lease = claim_one(broker, delivery)
    delivery.failures.append(Failure(AWAY, done))

    with pytest.raises(ConnectionError):
        delivery.settle([Settlement(lease)])

    assert (lease in broker.leases) is not done
    assert delivery.settle([Settlement(lease)]) == [Written.LOST if done else Written.DONE]


def test_a_command_of_nothing_is_not_sent(delivery: MemoryDelivery):
    """So it cannot fail."""
    delivery.failures.append(Failure(AWAY, done=False))

    assert (delivery.settle([]), delivery.begin([]), delivery.cancelled_among([])) == ([], [], set())
    assert len(delivery.failures) == 1


def test_attached_it_answers_when_told_and_in_order(broker: MemoryBroker, delivery: MemoryDelivery):
    answers: list[object] = []
    broker.submit("fake", "a", b"message")
    delivery.attach()
    delivery.claim_soon("fake", 1, answers.append, lambda: answers.append("lost"))
    delivery.settle_soon([Settlement("none")], answers.append, lambda: answers.append("lost"))
    assert (answers, broker.leases, delivery.under_way) == ([], {}, 2)

    delivery.carry_out()
    assert (answers, len(broker.leases)) == ([], 1)

    assert delivery.answer()
    assert [type(answer) for answer in answers] == [Claim]
    delivery.wait()
    assert answers[1:] == [[Written.LOST]]
    assert not delivery.answer()


@pytest.mark.parametrize("done", [False, True])
def test_what_is_under_way_when_a_command_fails_is_lost(broker: MemoryBroker, delivery: MemoryDelivery, done: bool):
    """The last sent first, as with the real connection: so who puts it back in front has it in order."""
    lost: list[str] = []
    lease = claim_one(broker, delivery)
    delivery.attach()
    delivery.settle_soon([Settlement(lease)], lambda _: None, lambda: lost.append("first"))
    delivery.failures.append(Failure(AWAY, done))

    with pytest.raises(ConnectionError):
        delivery.settle_soon([Settlement("none")], lambda _: None, lambda: lost.append("second"))

    assert lost == ["second", "first"]
    assert (lease in broker.leases) is not done
    assert delivery.under_way == 0


def test_detached_each_command_is_waited_for(broker: MemoryBroker, delivery: MemoryDelivery):
    answers: list[object] = []
    delivery.attach()
    delivery.settle_soon([Settlement("none")], answers.append, lambda: answers.append("lost"))
    delivery.detach()
    assert answers == [[Written.LOST]]

    delivery.failures.append(Failure(AWAY, done=True))
    with pytest.raises(ConnectionError):
        delivery.settle_soon([Settlement("none")], answers.append, lambda: answers.append("lost"))
    assert answers[1:] == ["lost"]


def test_leases_are_kept_while_they_are_held_and_not_past_their_deadline(
    broker: MemoryBroker, delivery: MemoryDelivery, clock: ManualClock
):
    leases = MemoryLeases(broker, FLEET)
    broker.submit("fake", "a", b"a")
    broker.submit("fake", "b", b"b")
    first, second = (message.lease for message in delivery.claim("fake", 2).messages)
    leases.hold(first)
    leases.hold(second, clock() + 12)
    for _ in range(3):
        clock.advance(5)
        leases.keep()
    assert leases.tend() == set()

    _, swept = delivery.sweep()
    leases.keep()

    assert [message.payload for message in swept] == [b"b"]
    assert leases.tend() == {second}
    assert leases.held.keys() == {first}


def test_what_was_settled_just_before_is_not_lost(broker: MemoryBroker, delivery: MemoryDelivery):
    leases = MemoryLeases(broker, FLEET)
    lease = claim_one(broker, delivery)
    leases.hold(lease)
    delivery.settle([Settlement(lease)])
    leases.keep()

    assert leases.tend(lambda: leases.release([lease])) == set()
