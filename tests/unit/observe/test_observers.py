"""Those who watch are told of each step once and in order, and one that fails harms nobody."""

from __future__ import annotations

import logging

from workers.observe.observers import Observer, Observers


class Noting(Observer):
    """Notes what it is told of two steps."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def request_left(self, item: object) -> None:
        self.told.append(item)

    def flush(self) -> None:
        self.told.append("flush")


class Failing(Observer):
    """Fails at every step that it is told of."""

    def request_left(self, item: object) -> None:
        raise ValueError(item)


def test_one_that_fails_is_counted_and_left_alone(caplog) -> None:
    """The others are told all the same; the log has one line for a kind of failure, however often it happens."""
    noting = Noting()
    observers = Observers([Failing(), noting])

    with caplog.at_level(logging.ERROR):
        for number in range(3):
            observers.tell("request_left", number)

    assert noting.told == [0, 1, 2]
    assert observers.failures == {"Failing.request_left": 3}
    assert len(caplog.records) == 1


def test_what_is_posted_is_told_in_order_when_the_loop_looks() -> None:
    """Other threads post; nothing is told on them, and what nobody listens to is not kept."""
    noting = Noting()
    observers = Observers([noting])
    for number in range(3):
        observers.post("request_left", number)
    observers.post("lease_lost", "nobody listens")
    assert noting.told == []

    observers.deliver()
    observers.deliver()

    assert noting.told == [0, 1, 2]
    assert observers.listens("flush")
    assert not observers.listens("tokens_made")


def test_one_that_is_added_later_is_told_from_then_on() -> None:
    """In the order in which they were added, and only of the steps that they care about."""
    first, second = Noting(), Noting()
    observers = Observers([first])
    observers.tell("flush")

    observers.add(second)
    observers.tell("flush")

    assert (first.told, second.told) == (["flush", "flush"], ["flush"])
