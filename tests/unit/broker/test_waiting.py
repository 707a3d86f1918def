"""What a consumer knows of its queues."""

from __future__ import annotations

import time

import pytest

from shared import keys
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


def test_tenants_that_were_left_out_are_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody tells when one of their requests has ended."""
    now = time.monotonic()
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    waiting = Waiting()
    waiting.asked("a")
    waiting.answered("a", claim(left_out=1))
    assert waiting.due(["a"]) == []

    now += module.LEFT_OUT_SECONDS

    assert waiting.due(["a"]) == ["a"]


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
