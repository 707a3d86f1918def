"""When an engine is rested, and when it is tried again. The clock is passed in."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shared.errors import EngineDied, EngineError, EngineLoadError
from shared.settings import BreakerSettings
from workers.models.breaker import CircuitBreaker, State

SETTINGS = BreakerSettings(failures=3, rest_seconds=10, longest_rest_seconds=35)


# Requirements: 1.6
def test_failures_in_a_row_open_it_and_each_rest_is_longer() -> None:
    """Three failures open it for 10 s; on probation one is enough, and the next rests take 20 s and at most 35 s."""
    breaker = CircuitBreaker(SETTINGS)
    rests = []

    assert not breaker.failed(EngineError("1"), 0.0)
    assert not breaker.failed(EngineError("2"), 0.0)
    assert breaker.failed(EngineError("3"), 0.0)
    rests.append(breaker.due)
    for _ in range(3):
        breaker.try_again()
        assert breaker.state is State.HALF_OPEN
        assert breaker.failed(EngineError("again"), 100.0)
        rests.append(breaker.due - 100.0)

    assert rests == [10, 20, 35, 35]


def test_a_success_closes_it_and_forgets() -> None:
    """After a success it takes three failures again, and the rest is the first one."""
    breaker = CircuitBreaker(SETTINGS)
    for _ in range(3):
        breaker.failed(EngineError("x"), 0.0)
    breaker.try_again()

    breaker.succeeded()

    assert breaker.state is State.CLOSED
    assert breaker.error is None
    assert not breaker.failed(EngineError("x"), 0.0)


def test_an_outage_opens_it_at_once() -> None:
    """A model that cannot be loaded rests; a process that died once is started again without a rest."""
    loading, died = CircuitBreaker(SETTINGS), CircuitBreaker(SETTINGS)

    assert loading.failed(EngineLoadError("no such file"), 5.0)
    assert died.failed(EngineDied("killed"), 5.0)
    assert (loading.due, died.due) == (15.0, 5.0)

    died.try_again()
    assert died.failed(EngineDied("killed"), 5.0)
    assert died.due == 25.0


@given(st.lists(st.sampled_from(["success", "failure", "outage", "trial"]), max_size=60))
def test_it_is_open_exactly_while_it_has_an_error_and_a_time(steps: list[str]) -> None:
    """Whatever happens: an open breaker has the error to tell and a time to try again, any other has neither."""
    breaker = CircuitBreaker(SETTINGS)
    for step in steps:
        if step == "success" and breaker.state is not State.OPEN:
            breaker.succeeded()
        elif step == "failure":
            breaker.failed(EngineError("x"), 0.0)
        elif step == "outage":
            breaker.failed(EngineLoadError("x"), 0.0)
        elif breaker.state is State.OPEN:
            breaker.try_again()

        is_open = breaker.state is State.OPEN
        assert (breaker.error is not None) == is_open
        assert (breaker.due < float("inf")) == is_open
