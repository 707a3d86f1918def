"""What a consumer knows of its queues."""

from __future__ import annotations

import time

import pytest

from shared import keys
from tests.support.clock import ManualClock
from workers.broker import waiting as module
from workers.broker.delivery import LeasedMessage
from workers.broker.waiting import Claim, Waiting


def claim(*, waiting: bool = False, left_out: int = 0) -> Claim:
    """A claim's answer."""
    return Claim(0.0, waiting, left_out, 0, [LeasedMessage("1", b"{}")])


def empty(*queues: str) -> Waiting:
    """These queues were found empty."""
    found = Waiting()
    for queue in queues:
        found.asked(queue)
        found.answered(queue, claim())
    return found


def test_a_queue_is_claimed_from_until_it_is_found_empty() -> None:
    """Not while a claim is under way; again where more is left, or where the claim was lost."""
    waiting = Waiting()
    assert waiting.due(["a", "b"]) == ["a", "b"]

    waiting.asked("a")
    assert waiting.due(["a", "b"]) == ["b"]
    waiting.answered("a", claim(waiting=True))
    assert waiting.due(["a", "b"]) == ["a", "b"]
    waiting.asked("a")
    waiting.lost("a")
    assert waiting.due(["a", "b"]) == ["a", "b"]
    waiting.asked("a")
    waiting.answered("a", claim())
    assert waiting.due(["a", "b"]) == ["b"]


@pytest.mark.parametrize("name", [*keys.lists_of("a"), *keys.lanes_of("a")])
def test_news_of_any_list_of_a_queue_is_news_of_the_queue(name: str) -> None:
    """Priorities and tenants' lanes have lists of their own. Other queues stay as they are."""
    waiting = empty("a", "b")

    assert waiting.changed([name.encode()]) is True

    assert waiting.due(["a", "b"]) == ["a"]


def test_what_else_changes_is_no_news() -> None:
    """A script reads other keys as well. After a loss of the connection everything may have changed."""
    waiting = empty("a", "b")

    assert waiting.changed([keys.CANCELLED.encode(), keys.queue_state("a").encode()]) is False
    assert waiting.due(["a", "b"]) == []
    assert waiting.changed(None) is True
    assert waiting.due(["a", "b"]) == ["a", "b"]


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> ManualClock:
    """The steady clock."""
    clock = ManualClock()
    monkeypatch.setattr(module.time, "monotonic", clock)
    return clock


def left_out(*, found: int = 0) -> Waiting:
    """In ``a`` all that waits is of tenants that have their share, but for what was found; ``b`` was empty."""
    waiting = empty("a", "b")
    waiting.changed([keys.list_of("a", 0).encode()])
    waiting.asked("a")
    waiting.answered("a", Claim(0.0, False, 1, 0, [LeasedMessage("1", b"{}")] * found))
    return waiting


IN_FLIGHT = keys.IN_FLIGHT.encode()


def test_when_a_tenant_has_less_in_flight_it_is_looked_at_at_once(steady: ManualClock) -> None:
    """And without news after a while."""
    waiting = left_out()
    steady.advance(1)
    assert waiting.due(["a", "b"]) == []
    assert waiting.changed([IN_FLIGHT]) is True
    assert waiting.due(["a", "b"]) == ["a"]

    waiting = left_out()
    steady.advance(module.LEFT_OUT_SECONDS)
    assert waiting.due(["a", "b"]) == ["a"]


@pytest.mark.parametrize("news", [IN_FLIGHT, keys.lanes_of("a")[1].encode()])
def test_where_much_goes_on_it_is_looked_at_in_good_measure(steady: ManualClock, news: bytes) -> None:
    """What ends elsewhere, and is claimed elsewhere, is news each time."""
    waiting, looks = left_out(), 0
    for _ in range(1000):
        steady.advance(0.001)
        if waiting.changed([news]) or waiting.due(["a"]):
            looks += 1
            waiting.asked("a")
            waiting.answered("a", Claim(0.0, False, 1, 0, []))
    assert looks == 20

    assert waiting.changed([news]) is False
    assert waiting.wake_at() == steady.now + module.PACE_SECONDS
    steady.advance(module.PACE_SECONDS)
    assert waiting.due(["a"]) == ["a"]


def test_who_ends_a_request_looks_at_once(steady: ManualClock) -> None:
    """So does who has just found something."""
    waiting = left_out()
    assert waiting.freed() is True
    assert waiting.due(["a", "b"]) == ["a"]
    assert empty("a").freed() is False

    waiting = left_out(found=1)
    assert waiting.changed([IN_FLIGHT]) is True
    assert waiting.due(["a", "b"]) == ["a"]


def test_nobody_left_out_is_no_reason_to_look(steady: ManualClock) -> None:
    waiting = left_out()
    waiting.changed(None)
    waiting.asked("a")
    waiting.answered("a", Claim(0.0, False, 0, 0, []))

    assert waiting.changed([IN_FLIGHT]) is False
    assert waiting.wake_at() is None


def test_a_broker_that_owes_an_answer_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was asked just now is not; nor one that has answered everything."""
    now = time.monotonic()
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    waiting = empty("a")
    waiting.asked("a")
    assert not waiting.silent()

    now += 1.1 * module.SILENCE_SECONDS

    assert waiting.silent()
    waiting.answered("a", claim())
    assert not waiting.silent()
