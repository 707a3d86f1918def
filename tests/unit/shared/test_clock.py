"""What a process knows of the broker's clock."""

from __future__ import annotations

import pytest

from producer.client.submission import prepare
from shared.broker_checks import check_clock
from shared.clock import BrokerClock
from shared.contract import InferenceRequest
from shared.features import Feature
from shared.findings import Grade

HOUR = 3600.0
REQUEST = {"model": "echo", "inputs": {"prompt": "x"}}


class Machine:
    """A machine whose clock may be wrong, on a broker whose clock is right; time passes when a test says so."""

    def __init__(self, ahead: float = 0.0) -> None:
        self.true = 1_800_000_000.0
        self.ahead = ahead
        self.since_start = 12.0
        self.clock = BrokerClock(lambda: self.true + self.ahead, lambda: self.since_start)

    def advance(self, seconds: float) -> None:
        self.true += seconds
        self.since_start += seconds

    def hear(self, there: float = 0.0, back: float = 0.0) -> None:
        """The broker answers after these times."""
        asked = self.clock.steady()
        self.advance(there)
        broker = self.true
        self.advance(back)
        self.clock.learn(broker, asked, self.clock.steady())


@pytest.mark.parametrize("ahead", [0.0, HOUR, -HOUR, -10.0])
def test_it_tells_the_brokers_time_whatever_its_machines_clock_shows(ahead: float):
    """Once the broker has answered; before, there is nothing better than the machine's clock."""
    machine = Machine(ahead)
    assert machine.clock() == machine.true + ahead
    assert machine.clock.ahead is None
    machine.hear(0.004, 0.004)
    machine.advance(100)

    assert machine.clock() == pytest.approx(machine.true, abs=1e-5)
    assert machine.clock.ahead == pytest.approx(ahead, abs=1e-5)
    assert machine.clock.from_here(machine.true + ahead + 5) == pytest.approx(machine.true + 5, abs=1e-5)
    assert machine.clock.to_here(machine.true + 5) == pytest.approx(machine.true + ahead + 5, abs=1e-5)


@pytest.mark.parametrize("step", [HOUR, -HOUR, -10.0])
def test_a_step_of_the_machines_clock_moves_nothing(step: float):
    """It is noticed, for the machine may have been suspended."""
    machine = Machine()
    machine.hear()
    machine.ahead += step

    assert machine.clock() == machine.true
    assert machine.clock.doubtful
    machine.hear()
    assert not machine.clock.doubtful
    assert machine.clock.ahead == step


def test_the_time_of_a_suspended_machine_is_learnt_anew():
    machine = Machine()
    machine.hear()
    machine.true += HOUR  # the steady clock has stood still

    assert machine.clock.doubtful
    machine.hear(2.0, 0.0)
    assert machine.clock() == pytest.approx(machine.true, abs=1.0)


def test_an_answer_that_took_long_is_believed_only_where_it_says_more():
    """A worse one is passed over, one that contradicts what is known is not: the broker may be another now."""
    machine = Machine()
    machine.hear(0.001, 0.001)
    machine.hear(0.0, 1.0)
    assert machine.clock() == pytest.approx(machine.true, abs=1e-3)
    machine.true += 30
    machine.ahead -= 30
    machine.hear(0.5, 0.5)
    assert machine.clock() == pytest.approx(machine.true, abs=1e-3)


@pytest.mark.parametrize("ahead", [0.0, HOUR, -HOUR])
def test_what_a_caller_says_of_time_becomes_a_deadline_of_the_brokers(ahead: float):
    """Also where the broker is heard only after the request was made. The first of its times counts."""
    machine = Machine(ahead)
    here = machine.true + ahead
    given = [
        prepare(REQUEST, 5.0, machine.clock),
        prepare({**REQUEST, "deadline": here + 5}, 60.0, machine.clock),
        prepare({**REQUEST, "timeout": 5}, None, machine.clock),
        prepare(InferenceRequest.parse({**REQUEST, "timeout": 5, "deadline": here + 60}), None, machine.clock),
    ]
    machine.advance(2)
    machine.hear()
    machine.ahead = 77.0

    requests = [one.by(machine.clock).request for one in given]
    assert [request.deadline for request in requests] == [pytest.approx(machine.true + 3)] * 4
    assert {request.features for request in requests} == {frozenset()}
    assert prepare(REQUEST, None, machine.clock).by(machine.clock).request.deadline is None


def test_a_timeout_in_a_message_needs_workers_that_know_it():
    assert InferenceRequest.parse({**REQUEST, "timeout": 5}).features == {Feature.TIMEOUT}


def test_a_wrong_clock_is_found():
    assert check_clock(None).grade is check_clock(-0.9).grade is Grade.OK
    found = check_clock(HOUR)
    assert (found.grade, "3600.0 s ahead of the broker's" in found.detail) == (Grade.WARN, True)
    assert "10.0 s behind" in check_clock(-10.0).detail
