"""Remote control, where Celery's own commands would say yes to what does not happen here.

Engines run on threads of their own, not in Celery's pool: its size means nothing. Events are sent where
``fleet.send_events`` says so.
"""

from __future__ import annotations

from typing import Any

from celery.worker.control import Panel, nok, ok

POOL = (
    "a worker of this fleet has no pool to resize: how much it runs at once is optimization.batcher.max_batch_size; "
    "for more, start more workers"
)

TASK = "task"


def _no_pool(_state: Any, *_args: Any, **_kwargs: Any) -> dict[str, str]:
    """Refused: engines do not run in Celery's pool."""
    answer: dict[str, str] = nok(POOL)
    return answer


def _sends(state: Any) -> bool:
    """Whether task events are sent: no group means every group."""
    dispatcher = state.consumer.event_dispatcher
    return bool(dispatcher is not None and dispatcher.enabled and (not dispatcher.groups or TASK in dispatcher.groups))


def _enable_events(state: Any) -> Any:
    """Tell worker(s) to send task-related events."""
    dispatcher = state.consumer.event_dispatcher
    if dispatcher is None or not dispatcher.enabled:
        return nok("this worker sends no events of any kind")
    if _sends(state):
        return ok("task events already enabled")
    dispatcher.groups.add(TASK)
    return ok("task events enabled")


def _disable_events(state: Any) -> Any:
    """Tell worker(s) to stop sending task-related events."""
    dispatcher = state.consumer.event_dispatcher
    if not _sends(state):
        return ok("task events already disabled")
    dispatcher.groups = {"worker"}
    return ok("task events disabled")


def register() -> None:
    """Take the place of Celery's commands."""
    for name in ("pool_grow", "pool_shrink", "pool_restart", "autoscale"):
        Panel.data[name] = _no_pool
    Panel.data["enable_events"], Panel.data["disable_events"] = _enable_events, _disable_events
