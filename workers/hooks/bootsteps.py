"""Where the fleet hooks into Celery's worker: one step for the process, one for the broker connection."""

from __future__ import annotations

import gc
import logging
from typing import Any

from celery import bootsteps
from celery.app.task import Task
from celery.exceptions import WorkerShutdown

from shared.contract import TASK_NAME, EngineName
from shared.errors import BadRequest, FleetError, UndecodableMessage
from workers.fleet import Fleet
from workers.hooks import internals
from workers.hooks.consumer import PROTOCOL_1

logger = logging.getLogger(__name__)

TEND_SECONDS = 0.25
"""How often what runs is looked at for requests that were cancelled or have expired."""


def fleet_of(app: Any) -> Fleet:
    """The fleet of an app made by :func:`workers.celery.create_app`."""
    fleet: Fleet = app.fleet
    return fleet


class EngineStep(bootsteps.StartStopStep):
    """Loads the engines before anything is consumed. They are unloaded by :class:`workers.worker.FleetWorker`."""

    requires = ("celery.worker.components:Pool",)

    def start(self, worker: Any) -> None:
        """Serve the queues of the command line."""
        if (warning := internals.unchecked(internals.Recorded.read(internals.KEPT))) is not None:
            logger.warning("%s", warning)
        try:
            task = worker.app.tasks[TASK_NAME]
            task.time_limit = task.time_limit or worker.time_limit
            task.soft_time_limit = task.soft_time_limit or worker.soft_time_limit
            fleet_of(worker.app).serve(worker.app.amqp.queues.consume_from)
        except FleetError as error:
            logger.critical("%s", error.message)
            raise WorkerShutdown(1) from error


class IntakeStep(bootsteps.StartStopStep):
    """Connects the intakes to each broker connection, and sweeps."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, consumer: Any) -> None:
        """A connection is there: report through it."""
        consumer.app.hostname = consumer.hostname
        fleet_of(consumer.app).events.attach(consumer)

    def register_with_event_loop(self, consumer: Any, hub: Any) -> None:
        """The loop is about to run: settle what was left over, sweep every second, be ready for requests."""
        fleet = fleet_of(consumer.app)
        gc.collect()  # what the connection before needed is half a megabyte of cycles, which nothing else collects soon
        fleet.delivery.scripts.attach(hub)
        fleet.attach(hub)
        hub.call_repeatedly(TEND_SECONDS, fleet.tend)
        interval = fleet.settings.fleet.sweep_seconds
        again: Any = None

        def sweep(look: bool = True) -> None:
            nonlocal again
            if again is not None:
                again.cancel()
            due = fleet.sweeper.sweep(look=look)
            again = None if due is None or due >= interval else hub.call_later(due + 0.001, sweep, False)

        hub.call_repeatedly(interval, sweep)
        hub.call_repeatedly(TEND_SECONDS, fleet.doubts.tend)
        hub.call_soon(sweep)
        # After the loop's first turn it consumes, and has subscribed to remote control.
        hub.call_soon(hub.call_soon, fleet.consuming)


def strategy(task: Task, app: Any, consumer: Any, **kwargs: Any) -> Any:  # noqa: ARG001  # Celery's signature
    """Celery's hook for what happens to a received message. Those of an engine's queue go to its intake before."""

    def receive(message: Any, *_: Any, **__: Any) -> None:
        if "task" not in message.headers:
            consumer.refuse(message, UndecodableMessage(PROTOCOL_1))
            return
        consumer.refuse(
            message, BadRequest(f"{TASK_NAME} runs on the queues of the engines only: {', '.join(EngineName)}")
        )

    return receive
