"""When events are published: soon where somebody subscribes, seldom and only the last of them where nobody does."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery

from workers.hooks.events import Dispatcher
from workers.observe.celery_events import BUFFER_LIMIT, FLUSH_SECONDS, GROUP, UNHEARD_SECONDS, CeleryEvents
from workers.requests.inflight import InFlight


class Counting(Dispatcher):
    """The worker's dispatcher, with a count of what it publishes."""

    published = 0

    def _publish(self, event: list[dict[str, Any]], *_: Any, **__: Any) -> None:
        self.published += len(event)


@pytest.fixture
def worker() -> Iterator[SimpleNamespace]:
    """A worker's events, its dispatcher, and the timers that it has set."""
    with Celery(broker="memory://") as app, app.connection_for_write() as connection:
        dispatcher = Counting(connection, app=app, buffer_group=[GROUP])
        timers: list[float] = []
        loop = SimpleNamespace(call_later=lambda seconds, _: timers.append(seconds))
        events = CeleryEvents(app)
        events.attach(SimpleNamespace(event_dispatcher=dispatcher, hub=loop))
        yield SimpleNamespace(events=events, dispatcher=dispatcher, timers=timers)


def start(worker: SimpleNamespace, count: int) -> None:
    """So many requests begin."""
    item = InFlight("1", "fake", {"id": "one"}, {}, "", 1.0)
    for _ in range(count):
        worker.events._send("task-started", item)


@pytest.mark.parametrize(("heard", "seconds"), [(0, UNHEARD_SECONDS), (1, FLUSH_SECONDS), (None, FLUSH_SECONDS)])
def test_how_long_events_wait_for_each_other(worker, heard: int | None, seconds: float) -> None:
    """Where it is not known yet whether anybody subscribes, as if somebody did."""
    if heard is not None:
        worker.dispatcher.producer.channel.heard = {worker.dispatcher.exchange.name: heard}

    start(worker, 3)
    assert worker.timers == [seconds]
    worker.events.flush()

    assert worker.dispatcher.published == 3


@pytest.mark.parametrize("heard", [0, 1])
def test_what_nobody_hears_does_not_pile_up(worker, heard: int) -> None:
    """Many events at once are published, or forgotten; the last are kept for who may come."""
    worker.dispatcher.producer.channel.heard = {worker.dispatcher.exchange.name: heard}

    start(worker, BUFFER_LIMIT + 5)

    assert worker.dispatcher.published == heard * BUFFER_LIMIT
    assert len(worker.dispatcher.buffered(GROUP)) == 5
