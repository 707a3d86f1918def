"""Observers: each is told of each step once and in order, and none is in anybody's way."""

from __future__ import annotations

import logging

import pytest

from tests.support.items import item_of
from workers.observe.observers import STEPS, Observer, Observers
from workers.requests.inflight import InFlight


class Listens(Observer):
    """Writes down what it hears of."""

    def __init__(self, heard: list[str], name: str = "") -> None:
        self._heard = heard
        self._name = name

    def request_received(self, item: InFlight) -> None:
        self._heard.append(f"{self._name}received {item.id}")

    def request_left(self, item: InFlight) -> None:
        self._heard.append(f"{self._name}left {item.id}")


class Fails(Observer):
    """Hears nothing without failing."""

    def request_received(self, item: InFlight) -> None:
        raise RuntimeError("it fails")


def test_an_observer_that_fails_is_counted_logged_once_and_harms_nobody(caplog: pytest.LogCaptureFixture):
    heard: list[str] = []
    observers = Observers([Listens(heard, "1 "), Fails(), Listens(heard, "2 ")])
    with caplog.at_level(logging.ERROR):
        for name in "ab":
            observers.tell("request_received", item_of(name))

    assert heard == ["1 received a", "2 received a", "1 received b", "2 received b"]
    assert observers.failures == {"Fails.request_received": 2}
    assert len(caplog.records) == 1


def test_only_what_an_observer_overrides_is_listened_to():
    observers = Observers([Fails()])

    assert [step for step in STEPS if observers.listens(step)] == ["request_received"]


def test_what_is_posted_is_told_in_order_when_it_is_delivered_and_once():
    heard: list[str] = []
    observers = Observers([Listens(heard)])
    observers.post("request_received", item_of("a"))
    observers.post("batch_started", "fake", [])
    observers.post("request_left", item_of("a"))
    observers.tell("request_received", item_of("b"))
    assert heard == ["received b"]

    observers.deliver()
    observers.deliver()

    assert heard == ["received b", "received a", "left a"]


def test_one_that_comes_later_is_told_from_then_on():
    heard: list[str] = []
    observers = Observers()
    observers.tell("request_received", item_of("a"))
    observers.add(Listens(heard))
    observers.tell("request_received", item_of("b"))

    assert heard == ["received b"]
