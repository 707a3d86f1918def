"""What those who watch a fleet by Celery's events are told."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from celery import Celery


@contextmanager
def captured(app: Celery) -> Iterator[list[dict[str, Any]]]:
    """The events that are sent while the block runs."""
    events: list[dict[str, Any]] = []
    with app.connection_for_read() as connection:
        receiver = app.events.Receiver(connection, handlers={"*": events.append})
        listening = threading.Event()
        receiver.on_consume_ready = lambda *_, **__: listening.set()

        def capture() -> None:
            for _ in receiver.consume(limit=None, timeout=None):
                pass

        thread = threading.Thread(target=capture)
        thread.start()
        assert listening.wait(10)
        try:
            yield events
        finally:
            receiver.should_stop = True
            thread.join(10)
