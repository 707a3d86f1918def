"""Where the fleet hooks into Celery's worker: one step for the process, one for the broker connection."""

from __future__ import annotations

import gc
import logging
import time
import warnings
from functools import partial
from typing import Any

from celery import bootsteps
from celery.app.task import Task
from celery.exceptions import CPendingDeprecationWarning, WorkerShutdown
from celery.worker.consumer import Consumer

from shared.contract import TASK_NAME, EngineName
from shared.errors import BadRequest, ConfigurationError, FleetError, UndecodableMessage
from workers.ends import ending
from workers.fleet import TEND_SECONDS, Fleet
from workers.requests.inflight import LONGEST_NAMES, InFlight

logger = logging.getLogger(__name__)


def fleet_of(app: Any) -> Fleet:
    """The fleet of an app made by :func:`workers.celery.create_app`."""
    fleet: Fleet = app.fleet
    return fleet


RECONNECT_SECONDS = 2.0
"""Longest pause between two tries to connect: Celery's own grows to 30 s while a broker is away."""


BRIEF_SECONDS = 1.0
"""A connection that lasts no longer than this is not worth another at once."""


class FleetConsumer(Consumer):
    """Celery's consumer without its gossip: the registry knows who lives, and orphaned gossip queues fill brokers."""

    _lost_at = float("-inf")

    def __init__(self, *args: Any, worker_options: dict[str, Any] | None = None, **kwargs: Any) -> None:
        options = {**(worker_options or {}), "without_mingle": True, "without_gossip": True}
        super().__init__(*args, worker_options=options, **kwargs)

    # Celery's own reports of what it cannot run show the message with its body.

    def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:
        """A task that this worker does not have: its sender is told, and it is kept among the dead letters."""
        name = repr(message.headers.get("task"))[:LONGEST_NAMES]
        self.refuse(message, BadRequest(f"there is no task {name} here; there is {TASK_NAME}"))

    def on_unknown_message(self, body: Any, message: Any) -> None:
        """A message that is no task."""
        self.refuse(message, UndecodableMessage("the message names no task"))

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:
        """A task of this worker's whose message Celery cannot take."""
        self.refuse(message, UndecodableMessage(f"the message is not one of a task ({type(exc).__name__})"))

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """What is not JSON, or not what it says it is. A command of remote control is passed over."""
        if message.delivery_info.get("exchange") == "":
            self.refuse(message, UndecodableMessage("the message names no task, and its body is not JSON"))
            return
        logger.error("a command of type %.100r is passed over: %s", message.content_type, type(exc).__name__)
        message.ack()

    def refuse(self, message: Any, error: FleetError) -> None:
        """Give a message up: its sender is told, and it is kept among the dead letters."""
        fleet, queue = fleet_of(self.app), str(message.delivery_info.get("routing_key"))
        logger.error("a message on %s went to the dead letters: %s", queue, error)
        item = InFlight(message.delivery_tag, queue, message.headers, message.properties, "", time.time())
        message.channel.qos.forget(item.lease)
        fleet.leases.release([item.lease])
        fleet.delivery.settle([ending.failed(item, error, dead_reason=str(error))])
        if self.event_dispatcher:
            self.event_dispatcher.send("task-failed", uuid=item.id, exception=repr(error), traceback="")

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


class EngineStep(bootsteps.StartStopStep):
    """Loads the engines before anything is consumed. They are unloaded by :class:`workers.worker.FleetWorker`."""

    requires = ("celery.worker.components:Pool",)

    def start(self, worker: Any) -> None:
        """Serve the queues of the command line."""
        try:
            if not worker.use_eventloop:
                raise ConfigurationError(
                    f"the {worker.pool_cls.__module__} pool has no event loop; leave -P out: engines run on threads of "
                    "their own, and the solo pool is what the rest needs"
                )
            fleet_of(worker.app).serve(worker.app, worker.app.amqp.queues.consume_from)
        except FleetError as error:
            logger.critical("%s", error.message)
            raise WorkerShutdown(1) from error


class IntakeStep(bootsteps.StartStopStep):
    """Connects the intakes to each broker connection, and sweeps."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, consumer: Any) -> None:
        """A connection is there: report through it, and let requests be routed here."""
        fleet = fleet_of(consumer.app)
        if fleet.observer is not None:
            fleet.observer.attach(consumer)
        fleet.announce()

    def register_with_event_loop(self, consumer: Any, hub: Any) -> None:
        """The loop is about to run: settle what was left over, then sweep every few seconds."""
        fleet = fleet_of(consumer.app)
        gc.collect()  # what the connection before needed is half a megabyte of cycles, which nothing else collects soon
        fleet.delivery.scripts.attach(hub)
        fleet.tend()
        hub.call_repeatedly(TEND_SECONDS, fleet.tend)
        for intake in fleet.intakes.values():
            intake.attach(hub)
        interval = fleet.settings.fleet.sweep_seconds

        def sweep() -> None:
            due = fleet.sweeper.sweep()
            if due is not None and due < interval:
                hub.call_later(due + 0.001, fleet.sweeper.sweep)

        hub.call_repeatedly(interval, sweep)
        hub.call_soon(sweep)


def strategy(task: Task, app: Any, consumer: Any, **kwargs: Any) -> Any:  # noqa: ARG001  # Celery's signature
    """Celery's hook for what happens to a received message. Those of an engine's queue go to its intake before."""

    def receive(message: Any, *_: Any, **__: Any) -> None:
        consumer.refuse(
            message, BadRequest(f"{TASK_NAME} runs on the queues of the engines only: {', '.join(EngineName)}")
        )

    return receive
