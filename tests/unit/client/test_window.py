"""Many requests with a bounded number under way: order, errors in place, and room that has to be waited for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future

import pytest

from producer.client.records import Outcome
from producer.client.steps import AnyFuture, Pause, Steps, Wait
from producer.client.submitted import Submitted
from producer.client.window import CHUNK, Reading, Window
from shared.contract import EngineName, InferenceRequest, InferenceResult
from shared.errors import BadRequest, BrokerUnavailable, FleetError, QueueFull
from tests.support.clock import ManualClock


def result(name: str) -> InferenceResult:
    """An answer that says whose it is."""
    return InferenceResult(outputs={"text": name}, engine_used=EngineName.FAKE, latency_ms=1.0, batch_size=1)


class Fleet:
    """Answers at once; refuses a call with a request named ``bad``, and one of more than ``most`` requests."""

    def __init__(self, most: int = 1000, error: FleetError | None = None) -> None:
        self.calls: list[int] = []
        self.answered = True
        self.futures: list[Future] = []
        self._most = most
        self._error = error

    def checked(self, request: dict[str, str]) -> InferenceRequest:
        return InferenceRequest.parse({"model": "echo", "inputs": {"prompt": "x"}, **request})

    def ready(self, submitted: Submitted, seconds: float, other: AnyFuture | None = None) -> Steps[Outcome | None]:
        return submitted.future.result() if (yield Wait(submitted.future, seconds, other)) else None

    def look(self, submitted: Submitted, through_outages: bool) -> Steps[Outcome | None]:
        yield Pause(0)
        return None

    def outcome(self, submitted: Submitted, timeout: float | None, *, through_outages: bool) -> Steps[Outcome]:
        outcome = yield from self.ready(submitted, 60)
        assert outcome is not None
        return outcome

    def submit(self, requests: Sequence[InferenceRequest], timeout: float | None) -> Steps[list[Submitted]]:
        yield Pause(0)
        self.calls.append(len(requests))
        if self._error is not None:
            raise self._error
        if len(requests) > self._most:
            raise QueueFull("full", retry_after=0.0)
        if any(request.id == "bad" for request in requests):
            raise BadRequest("bad")
        submitted = []
        for request in requests:
            self.futures.append(future := Future())
            if self.answered:
                future.set_result(result(request.id))
            submitted.append(Submitted(request.id, future))
        return submitted


def drive(steps: Steps):
    """Carries steps out; futures that are waited for are done."""
    try:
        step = next(steps)
        while True:
            step = steps.send(step.future.done() if isinstance(step, Wait) else None)
    except StopIteration as end:
        return end.value


def through(fleet: Fleet, items: Iterable, size: int = 512, clock: ManualClock | None = None) -> Iterator[Outcome]:
    """The outcomes of the items."""
    window = Window(Reading(items, clock or ManualClock()), size, None, patient=True)
    while (outcome := drive(window.next(fleet))) is not None:
        yield outcome


def shown(outcome: InferenceResult | FleetError) -> str:
    """What an outcome says."""
    return outcome.message if isinstance(outcome, FleetError) else outcome.text


def names(count: int) -> list[dict[str, str]]:
    """Requests."""
    return [{"id": str(number)} for number in range(count)]


def outcomes(fleet: Fleet, items, size: int = 512) -> list[str]:
    """What comes of the items."""
    return [shown(outcome) for outcome in through(fleet, items, size)]


def test_outcomes_come_in_the_order_of_the_items() -> None:
    """Outcomes among the items are yielded in their place and not submitted."""
    fleet = Fleet()

    found = outcomes(fleet, [{"id": "a"}, BadRequest("unreadable"), {"id": "b"}, result("known")])

    assert found == ["a", "unreadable", "b", "known"]
    assert fleet.calls == [2]


@pytest.mark.parametrize("size", [1, 3, CHUNK, 100, 512])
def test_no_more_than_the_window_are_read_ahead(size: int) -> None:
    """Of an endless source, at most as many are taken as the window holds and one outcome has left."""
    read = 0

    def source():
        nonlocal read
        while True:
            read += 1
            yield {"id": str(read)}

    window = through(Fleet(), source(), size)
    found = [shown(next(window)) for _ in range(300)]

    assert found == [str(number) for number in range(1, 301)]
    assert read <= 300 + size


def test_a_bad_request_is_found_among_its_chunk() -> None:
    """The call that is refused is made again one by one: the bad one has its error, the others their answers."""
    items = [*names(5), {"id": "bad"}]

    assert outcomes(Fleet(), items) == ["0", "1", "2", "3", "4", "bad"]


def test_a_full_queue_is_tried_with_less() -> None:
    """What does not fit is halved until it does; nothing is lost and the order stays."""
    fleet = Fleet(most=10)

    assert outcomes(fleet, names(100)) == [str(number) for number in range(100)]
    assert fleet.calls[:3] == [64, 32, 16]


def test_a_broker_that_is_away_is_each_ones_error() -> None:
    """Without tries one by one."""
    fleet = Fleet(error=BrokerUnavailable("away"))

    assert outcomes(fleet, names(3)) == ["away"] * 3
    assert fleet.calls == [3]


def test_the_first_outcome_does_not_wait_for_a_full_window() -> None:
    """What is there is yielded before more is read."""
    read = []

    def source():
        for number in range(512):
            read.append(number)
            yield {"id": str(number)}

    assert shown(next(through(Fleet(), source()))) == "0"
    assert len(read) == CHUNK


def test_a_slow_source_is_not_waited_for() -> None:
    """What it has yielded is submitted, and its outcome is there when the next item is."""
    read, clock = [], ManualClock()

    def source():
        for number in range(10):
            read.append(number)
            yield {"id": str(number)}
            clock.advance(1.0)

    assert shown(next(through(Fleet(), source(), clock=clock))) == "0"
    assert len(read) <= 2


def test_an_item_that_is_no_request_is_one_bad_member() -> None:
    """Whatever it is, it is told in its place, and takes no round trips of the others."""
    fleet = Fleet()

    found = outcomes(fleet, [{"id": "a"}, {"id": "b\n"}, {"id": "c"}])

    assert [found[0], found[2]] == ["a", "c"]
    assert found[1].startswith("id: ")
    assert fleet.calls == [2]


def test_what_is_left_in_the_middle_goes_on() -> None:
    """A call that is given up while it submits loses nothing: the next one submits the same requests."""
    fleet = Fleet()
    window = Window(Reading(names(3)), 512, None, patient=True)
    left = window.next(fleet)
    next(left)  # it is about to submit
    left.close()

    found = [shown(drive(window.next(fleet))) for _ in range(3)]

    assert found == ["0", "1", "2"]
    assert drive(window.next(fleet)) is None
