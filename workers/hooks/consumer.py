"""Celery's consumer, as this worker runs it: what it cannot run is refused, and a broker that is away is waited for."""

from __future__ import annotations

import logging
import time
import warnings
from functools import partial
from typing import Any

from celery.exceptions import CPendingDeprecationWarning
from celery.worker.consumer import Consumer

from shared.contract import TASK_NAME
from shared.errors import BadRequest, FleetError, UndecodableMessage
from workers.fleet import Fleet
from workers.hooks import commands  # noqa: F401  # takes the place of Celery's commands of the same names
from workers.requests.ending import Ending
from workers.requests.inflight import LONGEST_NAMES, InFlight

logger = logging.getLogger(__name__)

RECONNECT_SECONDS = 2.0
"""Longest pause between two tries to connect: Celery's own grows to 30 s while a broker is away."""

PROTOCOL_1 = (
    "the message is of Celery's task protocol 1, which has the task's name in its body; send protocol 2 "
    "(task_protocol = 2, Celery's own default)"
)

BRIEF_SECONDS = 1.0
"""A connection that lasts no longer than this is not worth another at once."""


class FleetConsumer(Consumer):
    """Celery's consumer without its gossip: the registry knows who lives, and orphaned gossip queues fill brokers."""

    _lost_at = float("-inf")

    def __init__(self, *args: Any, worker_options: dict[str, Any] | None = None, **kwargs: Any) -> None:
        options = {**(worker_options or {}), "without_mingle": True, "without_gossip": True}
        super().__init__(*args, worker_options=options, **kwargs)

    @property
    def fleet(self) -> Fleet:
        """The fleet of this worker's app."""
        fleet: Fleet = self.app.fleet
        return fleet

    # Celery's own reports of what it cannot run show the message with its body.

    def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:
        """A task that this worker does not have: its sender is told, and it is kept among the dead letters."""
        if "task" not in message.headers:
            self.refuse(message, UndecodableMessage(PROTOCOL_1))
            return
        name = repr(message.headers.get("task"))[:LONGEST_NAMES]
        self.refuse(message, BadRequest(f"there is no task {name} here; there is {TASK_NAME}"))

    def on_unknown_message(self, body: Any, message: Any) -> None:
        """A message that is no task."""
        self.refuse(message, UndecodableMessage("the message names no task"))

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:
        """A task of this worker's whose message Celery cannot read."""
        self.refuse(message, UndecodableMessage(f"the message is not one of a task ({type(exc).__name__})"))

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """What is not JSON, or not what it says it is. A command of remote control is passed over."""
        if message.delivery_info.get("exchange") == "":
            self.refuse(message, UndecodableMessage("the message names no task, and its body is not JSON"))
            return
        logger.error("a command of type %.100r is passed over: %s", message.content_type, type(exc).__name__)
        message.ack()

    def add_task_queue(self, queue: str, *args: Any, **kwargs: Any) -> None:
        """Consume from another queue, and let the fleet know."""
        super().add_task_queue(queue, *args, **kwargs)
        self.fleet.consuming()

    def cancel_task_queue(self, queue: str) -> None:
        """Consume from a queue no longer, and let the fleet know: what waits there is for others."""
        super().cancel_task_queue(queue)
        self.fleet.consuming()

    def refuse(self, message: Any, error: FleetError) -> None:
        """Give a message up: its sender is told, and it is kept among the dead letters."""
        queue = str(message.delivery_info.get("routing_key"))
        logger.error("a message on %s went to the dead letters: %s", queue, error)
        body = message.body if isinstance(message.body, str) else bytes(message.body or b"").decode(errors="replace")
        item = InFlight(message.delivery_tag, queue, message.headers, message.properties, body, self.fleet.clock())
        self.fleet.settler.end([Ending.refused(item, error)])  # where the broker fails, the channel gives it back
        message.channel.qos.forget(item.lease)

    # -- the broker -------------------------------------------------------------------------------------------------

    def ensure_connected(self, conn: Any) -> Any:
        """Connect, trying again until the broker is there; a worker that is to stop stops trying."""
        conn.ensure_connection = partial(
            conn.ensure_connection, interval_start=0.5, interval_step=0.5, interval_max=RECONNECT_SECONDS
        )
        return super().ensure_connected(conn)

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Close what is left of the connection; where it did not last, pause before the next."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CPendingDeprecationWarning)  # of a setting that is set
            super().on_connection_error_after_connected(exc)
        now, last = time.monotonic(), self._lost_at
        self._lost_at = now
        if now - last < BRIEF_SECONDS:
            time.sleep(BRIEF_SECONDS / 2)
