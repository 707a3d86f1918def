"""Celery's event dispatcher, as this worker uses it."""

from __future__ import annotations

from typing import Any

from celery.app.events import Events
from celery.events.dispatcher import EventDispatcher


class Dispatcher(EventDispatcher):
    """Celery's dispatcher, which tries once: its heartbeat would hold the loop up for as long as the broker is away."""

    def send(self, type: str, *args: Any, retry: bool = False, **fields: Any) -> Any:  # noqa: A002  # Celery's name
        """Send an event, or buffer it."""
        return super().send(type, *args, retry=False, **fields)

    def buffered(self, group: str) -> list[Any]:
        """The events of a group that the next :meth:`flush` publishes together. What is appended to it is sent then."""
        events: list[Any] = self._group_buffer[group]
        return events


class FleetEvents(Events):
    """``app.events`` with this dispatcher."""

    dispatcher_cls = "workers.hooks.events:Dispatcher"
