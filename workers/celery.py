"""The Celery app: ``celery -A workers worker -Q pytorch`` is the whole command for a worker."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from celery import Celery, Task
from kombu import Queue
from kombu.transport import TRANSPORT_ALIASES

from shared import keys
from shared.contract import TASK_NAME, EngineName
from shared.errors import FleetError
from shared.settings import Settings
from workers.control import watch
from workers.fleet import Fleet
from workers.hooks import flower, remote, usage
from workers.hooks.bootsteps import EngineStep, IntakeStep
from workers.hooks.transport import TransportParts

TRANSPORT = BACKEND = "muai-redis"
TRANSPORT_ALIASES[TRANSPORT] = "workers.hooks.transport:Transport"


class Infer(Task):
    """The task that requests are calls of. Its messages go to the engine's intake, never through the pool."""

    name = TASK_NAME
    Strategy = "workers.hooks.bootsteps:strategy"
    typing = False
    ignore_result = False

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Only a worker that serves an engine's queue runs requests."""
        raise FleetError(f"{TASK_NAME} runs on the queues of the engines only: {', '.join(EngineName)}")


class FleetApp(Celery):
    """A Celery app with the fleet it serves."""

    fleet: Fleet
    hostname: str | None = None
    """The name of this process's worker, as remote control knows it."""

    events_cls = "workers.hooks.events:FleetEvents"

    @cached_property
    def Worker(self) -> Any:  # noqa: N802  # Celery's name
        """What ``celery worker`` runs."""
        return self.subclass_with_self("workers.worker:FleetWorker", "Worker", reverse="Worker")


def create_app(settings: Settings) -> FleetApp:
    """Build the app for these settings. Nothing connects yet."""
    app = FleetApp("muai", set_as_current=False)
    app.fleet = fleet = Fleet(settings, app)
    app.loader.override_backends = dict.fromkeys((BACKEND, "redis", "rediss"), "workers.hooks.backend:ChordBackend")
    parts = TransportParts(settings.fleet, fleet.delivery, fleet.settler, fleet.intakes, fleet.signer, fleet.limits)
    app.conf.update(
        broker_url=f"{TRANSPORT}://",
        broker_transport=TRANSPORT,
        broker_transport_options={"services": parts},
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_channel_error_retry=True,  # a full broker refuses commands: wait for room rather than exit
        result_backend=f"{BACKEND}://",
        result_backend_transport_options={"retry_policy": {"max_retries": 1}},  # the loop waits for it
        result_expires=settings.fleet.result_expires_seconds,
        accept_content=["json"],
        result_accept_content=["json"],
        task_serializer="json",
        result_serializer="json",
        event_serializer="json",
        task_default_queue=keys.CONTROL_QUEUE,
        task_queues=[Queue(name, routing_key=name) for name in (*map(keys.queue_of, EngineName), keys.CONTROL_QUEUE)],
        task_create_missing_queues=True,
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        worker_consumer="workers.hooks.consumer:FleetConsumer",
        worker_pool="solo",
        worker_concurrency=1,
        worker_prefetch_multiplier=1,
        worker_send_task_events=settings.fleet.send_events,
        worker_enable_remote_control=settings.fleet.remote_control,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_enable_prefetch_count_reduction=False,
        worker_hijack_root_logger=True,
        worker_redirect_stdouts=False,
        beat_max_loop_interval=5,
        event_queue_expires=60,
        event_queue_ttl=30,
    )
    app.register_task(Infer())
    watch.register(app, fleet.client, fleet.registry)
    remote.register()
    flower.teach(fleet.client)
    app.steps["worker"].add(EngineStep)
    app.steps["consumer"].add(IntakeStep)
    return app


def __getattr__(name: str) -> FleetApp:
    # The settings are read when the app is asked for, so that importing this module reads nothing.
    if name == "app":
        from shared.settings_loader import load_settings

        try:
            app = create_app(load_settings())
        except FleetError as error:
            usage.end_with(error)
        globals()["app"] = app
        return app
    raise AttributeError(name)
