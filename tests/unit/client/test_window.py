"""Many requests with a bounded number under way: order, errors in place, and room that has to be waited for."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

import pytest

from producer.client.handle import Handle
from producer.client.window import CHUNK, Window
from shared.contract import EngineName, InferenceResult
from shared.errors import BadRequest, BrokerUnavailable, FleetError, QueueFull


def result(name: str) -> InferenceResult:
    """An answer that says whose it is."""
    return InferenceResult(outputs={"text": name}, engine_used=EngineName.FAKE, latency_ms=1.0, batch_size=1)


class Fleet:
    """Answers at once; refuses a call with a request named ``bad``, and one of more than ``most`` requests."""

    def __init__(self, most: int = 1000, error: FleetError | None = None) -> None:
        self.calls: list[int] = []
        self._most = most
        self._error = error

    def submit_many(self, requests: Sequence[dict], *, timeout: float | None) -> list[Handle]:
        self.calls.append(len(requests))
        if self._error is not None:
            raise self._error
        if len(requests) > self._most:
            raise QueueFull("full", retry_after=0.0)
        if any(request["id"] == "bad" for request in requests):
            raise BadRequest("bad")
        handles = []
        for request in requests:
            future: Future = Future()
            future.set_result(result(request["id"]))
            handles.append(Handle(request["id"], future, None))
        return handles


def shown(outcome: InferenceResult | FleetError) -> str:
    """What an outcome says."""
    return outcome.message if isinstance(outcome, FleetError) else outcome.text


def names(count: int) -> list[dict[str, str]]:
    """Requests."""
    return [{"id": str(number)} for number in range(count)]


def outcomes(fleet: Fleet, items, size: int = 512) -> list[str]:
    """What comes of the items."""
    return [shown(outcome) for outcome in Window(fleet.submit_many, size, None, patient=True).outcomes(items)]


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

    window = Window(Fleet().submit_many, size, None, patient=True).outcomes(source())
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
