"""Looks at the fleet every few seconds and says what an operator should know."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import redis
from celery import Celery

from shared import keys
from shared.contract import EngineName
from shared.queues import waiting
from shared.registry import WorkerInfo, WorkerRegistry

logger = logging.getLogger(__name__)

WATCH_TASK = "muai.control.watch"
WATCH_SECONDS = 10.0


def stranded(lengths: Mapping[EngineName, int], workers: Sequence[WorkerInfo]) -> dict[EngineName, int]:
    """The queues that hold messages and have no live worker, with how many."""
    served = {queue for worker in workers for queue in worker.queues}
    return {engine: count for engine, count in lengths.items() if count and keys.queue_of(engine) not in served}


def register(app: Celery, client: redis.Redis, registry: WorkerRegistry) -> None:
    """Add the task and its schedule to the app. It runs on the control queue."""

    def watch() -> dict[str, int]:
        """Warn of queues whose messages nobody takes; returns them."""
        counts = waiting(client, [keys.queue_of(engine) for engine in EngineName])
        found = stranded({engine: counts[keys.queue_of(engine)] for engine in EngineName}, registry.live())
        for engine, count in found.items():
            logger.warning(
                "%d requests wait on %s and no live worker serves it; start one: celery -A workers worker -Q %s",
                count,
                engine,
                engine,
            )
        return {engine.value: count for engine, count in found.items()}

    app.task(name=WATCH_TASK, ignore_result=True, shared=False)(watch)
    app.conf.beat_schedule = {
        "watch": {
            "task": WATCH_TASK,
            "schedule": WATCH_SECONDS,
            "options": {"queue": keys.CONTROL_QUEUE, "expires": WATCH_SECONDS},
        }
    }
