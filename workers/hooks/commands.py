"""Remote control: an engine's queue is consumed with its engine, and what cannot be done is refused.

Celery's own commands answer before anything is done, and consume any queue with or without what runs its messages.
Importing this module puts ours in their place.
"""

from __future__ import annotations

from typing import Any

from celery.worker import control
from celery.worker.control import control_command, nok, ok

from shared.contract import TASK_NAME, EngineName
from shared.errors import FleetError
from workers.process.queues import check_names


def add_consumer(
    state: Any,
    queue: str,
    exchange: str | None = None,
    exchange_type: str | None = None,
    routing_key: str | None = None,
    **options: Any,
) -> Any:
    """Tell worker(s) to consume from task queue by name; an engine's is consumed when the engine has loaded."""
    consumer = state.consumer

    def consume() -> None:
        consumer.add_task_queue(queue, exchange, exchange_type or "direct", routing_key, **options)

    try:
        check_names([queue], state.app.amqp.queues)
        if queue in set(EngineName):
            state.app.fleet.take_on(EngineName(queue), consume)
        else:
            consumer.call_soon(consume)
    except FleetError as error:
        return nok(f"cannot consume from {queue}: {error.message}")
    return ok(f"add consumer {queue}")


def cancel_consumer(state: Any, queue: str, **_: Any) -> Any:
    """Tell worker(s) to stop consuming from task queue by name; what it has taken already it finishes."""
    if queue not in state.app.amqp.queues.consume_from:
        return nok(f"this worker does not consume from {queue}")
    state.consumer.call_soon(state.consumer.cancel_task_queue, queue)
    return ok(f"no longer consuming from {queue}")


def time_limit(state: Any, task_name: str, hard: object = None, soft: object = None, **_: Any) -> Any:
    """Tell worker(s) to modify the time limit for task by type: of requests, whose messages name none."""
    if task_name != TASK_NAME:
        return nok(f"only {TASK_NAME} has time limits here: other tasks run on the worker's loop, uninterrupted")
    for limit in (hard, soft):
        if limit is not None and not (isinstance(limit, int | float) and limit >= 0):
            return nok("a time limit is a number of seconds, at least 0")
    task = state.app.tasks[TASK_NAME]
    task.time_limit, task.soft_time_limit = hard, soft
    return ok("time limits set successfully")


def rate_limit(state: Any, task_name: str, rate_limit: object = None, **_: Any) -> Any:
    """Tell worker(s) to modify the rate limit for a task by type; requests have one for each tenant instead."""
    if task_name == TASK_NAME:
        return nok(f"{TASK_NAME} has no rate limit of a worker: set requests_per_second of a tenant (fleet.tenants)")
    return _celerys_rate_limit(state, task_name, rate_limit)


_celerys_rate_limit = control.rate_limit

control_command(
    name="time_limit",
    args=[("task_name", str), ("soft", float), ("hard", float)],
    signature="<task_name> <soft_secs> [hard_secs]",
)(time_limit)
control_command(
    name="rate_limit",
    args=[("task_name", str), ("rate_limit", str)],
    signature="<task_name> <rate_limit (e.g., 5/s | 5/m | 5/h)>",
)(rate_limit)
control_command(
    name="add_consumer",
    args=[("queue", str), ("exchange", str), ("exchange_type", str), ("routing_key", str)],
    signature="<queue> [exchange [type [routing_key]]]",
)(add_consumer)
control_command(name="cancel_consumer", args=[("queue", str)], signature="<queue>")(cancel_consumer)
