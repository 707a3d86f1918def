"""Tells Celery's observers of each request: task events, signals and worker state, as for any task.

Flower and celery-exporter read the events, instrumentation hooks the signals, ``celery inspect`` reads the state. A
signal without receivers costs nothing. No inputs and no outputs are in any of them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import orjson
from celery import Celery, signals
from celery.app.task import Context, Task
from celery.exceptions import Retry
from celery.utils.time import utcoffset
from celery.worker import state
from kombu.serialization import register

from shared.contract import TASK_NAME, EngineName
from workers.observe.observers import Observer
from workers.requests.ending import End, Ending
from workers.requests.inflight import InFlight

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 0.1
"""Events are published together this long after the first of them: one message for what would be a round trip each."""

UNHEARD_SECONDS = 1.0
"""The same while nobody subscribes to events: whoever does gets those of the last second."""

BUFFER_LIMIT = 2048
"""Events after which they are published at once, or forgotten where nobody subscribes."""

GROUP = "task"

Fields = Mapping[str, Any]

NO_FIELDS: Fields = {}

SERIALIZER = "muai-json"
"""JSON to whoever reads it, by a faster encoder: with Celery's own, events were a quarter of a worker's cost."""


class TaskEvent:
    """One of Celery's events about a task, which is written out when it is published: many never are.

    ``sender`` says which worker sends it, ``fields`` what its type has beside that.
    """

    __slots__ = ("clock", "fields", "id", "sender", "sent", "type")

    def __init__(self, sender: Fields, type: str, request_id: str, clock: int, fields: Fields) -> None:  # noqa: A002
        self.sender = sender
        self.type = type
        self.id = request_id
        self.clock = clock
        self.fields = fields
        self.sent = time.time()

    def written(self) -> dict[str, Any]:
        """As Celery's dispatcher writes it."""
        own = {"type": self.type, "timestamp": self.sent, "clock": self.clock, "uuid": self.id}
        return {**self.sender, **own, **self.fields}


register(
    SERIALIZER, partial(orjson.dumps, default=TaskEvent.written), None,
    content_type="application/json", content_encoding="utf-8",
)  # fmt: skip


class CeleryEvents(Observer):
    """Sends Celery's events and signals, and keeps what ``celery inspect`` reads."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._dispatcher: Any = None
        self._waiting: list[TaskEvent] = []
        self._sender: Fields = {}
        self.consumer: Any = None
        self._flush_due = False
        self._endings: Mapping[End, Callable[[Ending], None]] = {
            End.RESULT: self._succeeded,
            End.FAILURE: self._failed,
            End.DEAD_LETTER: self._failed,
            End.REFUSAL: self._failed,
            End.CANCEL: self._revoked,
            End.EXPIRY: self._revoked,
            End.HOP: self._retried,
        }

    @cached_property
    def task(self) -> Task:
        """The task that requests are calls of."""
        task: Task = self._app.tasks[TASK_NAME]
        return task

    def attach(self, consumer: Any) -> None:
        """Send through this consumer's event dispatcher from now on."""
        self.consumer = consumer
        self._dispatcher = dispatcher = consumer.event_dispatcher
        self._flush_due = False
        if dispatcher is not None:
            dispatcher.serializer = SERIALIZER
            self._waiting = dispatcher.buffered(GROUP)
            self._sender = {"hostname": dispatcher.hostname, "pid": dispatcher.pid, "utcoffset": utcoffset()}

    def flush(self) -> None:
        """Publish the events that wait."""
        due, self._flush_due = self._flush_due, False
        if due and self._dispatcher is not None:
            self._dispatcher.flush()

    def _send(self, event: str, item: InFlight, fields: Fields = NO_FIELDS) -> None:
        """Do what the dispatcher's ``send`` does, without asking for each event what is the same for all."""
        dispatcher = self._dispatcher
        if dispatcher is None or not dispatcher.enabled or (dispatcher.groups and GROUP not in dispatcher.groups):
            return
        self._waiting.append(TaskEvent(self._sender, event, item.id, dispatcher.clock.forward(), fields))
        if len(self._waiting) >= BUFFER_LIMIT:
            if self._heard():
                self.flush()
            else:
                self._waiting.clear()
        elif not self._flush_due:
            self._flush_due = True
            self.consumer.hub.call_later(FLUSH_SECONDS if self._heard() else UNHEARD_SECONDS, self.flush)

    def _heard(self) -> bool:
        """Whether somebody has received the last events, those of Celery's heartbeat among them."""
        producer = self._dispatcher.producer
        heard: Mapping[str, int] = getattr(producer.channel, "heard", {}) if producer is not None else {}
        return heard.get(self._dispatcher.exchange.name, 1) > 0

    def request_received(self, item: InFlight) -> None:
        """Send ``task-received``."""
        item.task = self.task
        state.task_reserved(item)
        told = item.headers.get
        self._send(
            "task-received", item, {
                "name": TASK_NAME, "args": "()", "kwargs": "{}", "root_id": told("root_id"),
                "parent_id": told("parent_id"), "retries": told("retries") or 0, "eta": told("eta"),
                "expires": told("expires"),
            },
        )  # fmt: skip
        if signals.task_received.receivers:
            signals.task_received.send(sender=self.consumer, request=item)

    def request_left(self, item: InFlight) -> None:
        """Take it out of what Celery's worker state shows."""
        state.task_ready(item)

    lease_lost = request_left

    def batch_started(self, engine: EngineName, items: Sequence[InFlight]) -> None:
        """Send ``task-started`` for each."""
        state.requests.update((item.id, item) for item in items)  # what state.task_accepted does for each
        state.active_requests.update(items)
        state.total_count[TASK_NAME] += len(items)
        state.all_total_count[0] += len(items)
        for item in items:
            self._send("task-started", item)
            if signals.task_prerun.receivers:
                with _Current(self.task, item):
                    signals.task_prerun.send(sender=self.task, task_id=item.id, task=self.task, args=(), kwargs={})

    def request_ended(self, ending: Ending) -> None:
        """Send the event that Celery has for it, where it has one."""
        state.task_ready(ending.item)
        tell = self._endings.get(ending.end)
        if tell is not None and (ending.end is not End.HOP or ending.error is not None):
            tell(ending)

    def _succeeded(self, ending: Ending) -> None:
        self._send("task-succeeded", ending.item, {"result": "", "runtime": ending.seconds})
        if signals.task_success.receivers:
            with _Current(self.task, ending.item):
                signals.task_success.send(sender=self.task, result=ending.result)
        self._postrun(ending.item, ending.result, "SUCCESS")

    def _failed(self, ending: Ending) -> None:
        item, error = ending.item, ending.error
        self._send("task-failed", item, {"exception": repr(error), "traceback": ""})
        if signals.task_failure.receivers:
            with _Current(self.task, item):
                signals.task_failure.send(
                    sender=self.task, task_id=item.id, exception=error, args=(), kwargs={}, traceback=None, einfo=None
                )
        self._postrun(item, error, "FAILURE")
        logger.info("%s[%s] failed: %s", TASK_NAME, item.id, type(error).__name__)

    def _retried(self, ending: Ending) -> None:
        item, error = ending.item, ending.error
        self._send("task-retried", item, {"exception": repr(error), "traceback": ""})
        if signals.task_retry.receivers:
            with _Current(self.task, item):
                signals.task_retry.send(
                    sender=self.task, request=self.task.request, reason=Retry(str(error), error), einfo=None
                )
        self._postrun(item, error, "RETRY")

    def _revoked(self, ending: Ending) -> None:
        item, expired = ending.item, ending.end is End.EXPIRY
        self._send("task-revoked", item, {"terminated": False, "signum": None, "expired": expired})
        if signals.task_revoked.receivers:
            signals.task_revoked.send(sender=self.task, request=item, terminated=False, signum=None, expired=expired)

    def _postrun(self, item: InFlight, value: Any, status: str) -> None:
        if item.started and signals.task_postrun.receivers:
            with _Current(self.task, item):
                signals.task_postrun.send(
                    sender=self.task, task_id=item.id, task=self.task, args=(), kwargs={}, retval=value, state=status
                )


class _Current:
    """Makes ``task.request`` that of ``item`` for the length of a block: instrumentation reads its headers."""

    def __init__(self, task: Task, item: InFlight) -> None:
        self._task = task
        self._item = item

    def __enter__(self) -> None:
        self._task.push_request(**context_of(self._item))

    def __exit__(self, *exc: object) -> None:
        self._task.pop_request()


def context_of(item: InFlight, embed: dict[str, Any] | None = None) -> dict[str, Any]:
    """The task context of a request, as Celery's worker builds it from the message."""
    return {
        **item.headers,
        **(embed or {}),
        "args": (),
        "kwargs": {},
        "correlation_id": item.id,
        "delivery_info": {"exchange": "", "routing_key": item.queue, "priority": item.priority, "redelivered": None},
        "headers": dict(item.headers),
        "is_eager": False,
        "called_directly": False,
    }


def request_context(item: InFlight, embed: dict[str, Any]) -> Context:
    """The same as the object that Celery's backends take."""
    return Context(context_of(item, embed))
