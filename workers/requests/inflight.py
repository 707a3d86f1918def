"""One request on its way through this worker."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from pydantic import ValidationError

from shared import keys, wire
from shared.contract import DEFAULT_TENANT, LATEST, TASK_NAME, Hop, InferenceRequest
from shared.errors import BadRequest, PayloadTooLarge, UndecodableMessage
from shared.identity import given_content
from workers.requests.rows import Rows

HANDLED = frozenset({"v", "hops", "deliveries"})
"""Of what is in our header: our client writes the first, workers the others, sealed."""

CANVAS = ("callbacks", "errbacks", "chain", "chord")
"""The parts of what a call carries for those that follow it."""

_CORRELATION = re.compile(rb'"correlation_id": ?"([^"\\]{1,128})"')

LARGEST_READ = 64 * 1024 * 1024
"""Bytes of a message that is refused, up to which it is read for whoever waits on what follows it."""

MOST_PASSED = 4
"""Workers that a request is passed on by: where so many cannot answer it in time, no other is asked."""

LONGEST_NAMES = 200
"""Characters that are shown of names that a sender chose."""


TimeLimits = tuple[float | None, float | None]
"""How many seconds a request may run, hard and soft; ``None`` is no limit."""


class State(StrEnum):
    """Where a claimed request stands in its worker. Which may follow which: :mod:`workers.requests.table`."""

    CLAIMED = "claimed"
    """It is looked at."""
    ASKING = "asking"
    """Others than our client have sent it: the broker is asked whether its id is under way already."""
    WAITING = "waiting"
    """It waits for others to run with, or for a place."""
    ALONE = "alone"
    """It may be what its workers died of: it waits until nothing else is in this worker's hands."""
    RUNNING = "running"
    """The engine has it."""
    RESTING = "resting"
    """It met a passing error, and is tried again here after a pause."""
    ENDED = "ended"
    """Its end is decided; what the engine may still say of it is not wanted."""


class InFlight:
    """A claimed message, its request, its state, and the times it went through.

    ``id`` may stand in logs and events; where the sender's own may not, that is the lease's. ``address`` is what the
    sender looks under for its answer, as it is; empty where it named nothing.

    Has what Celery's worker state and remote control read of a request (``id``, ``name``, ``info()``, …), so that
    ``celery inspect`` shows it. All times are seconds since the epoch, but for ``began``: since when it has run, by the
    steady clock, without the loading of its model.
    """

    name = TASK_NAME
    __slots__ = (
        "__weakref__",
        "address",
        "attempts",
        "began",
        "body",
        "claimed",
        "content",
        "deliveries",
        "embed",
        "eventer",
        "first_token",
        "foreign",
        "headers",
        "hops",
        "id",
        "lease",
        "passed",
        "priority",
        "properties",
        "queue",
        "reply",
        "request",
        "rows",
        "sent",
        "started",
        "state",
        "task",
        "time_limits",
    )  # fmt: skip

    def __init__(
        self,
        lease: str,
        queue: str,
        headers: Mapping[str, Any],
        properties: Mapping[str, Any],
        body: str,
        claimed: float,
    ) -> None:
        self.lease = lease
        self.queue = queue
        self.headers = headers
        self.properties = properties
        self.body = body
        self.claimed = claimed
        self.state = State.CLAIMED
        self.started = 0.0
        self.began = 0.0
        self.time_limits: TimeLimits = (None, None)
        self.first_token = 0.0
        self.attempts = 0
        self.task: Any = None
        self.eventer: Any = None  # set by Celery on what is in flight when it has to connect again
        self.embed: dict[str, Any] | None = None
        self.request: InferenceRequest | None = None
        self.rows: Rows | None = None  # since it waits
        own = wire.own_header(headers)
        named = wire.usable_id(headers.get("id"))
        self.id = named or wire.usable_id(properties.get("correlation_id")) or lease
        self.content = given_content(own.get("content"))
        self.address = named or wire.address_of(headers.get("id")) or wire.address_of(properties.get("correlation_id"))
        self.reply = wire.reply_of(own)
        # Others than our own client have sent it, and no worker has handled it; without an id it is like no other.
        self.foreign = self.id != lease and HANDLED.isdisjoint(own)
        sent = own.get("sent")
        self.sent = float(sent) if isinstance(sent, int | float) and 0 < sent <= claimed else claimed
        self.hops = _hops(own["hops"]) if "hops" in own else []
        deliveries = own.get("deliveries")
        self.deliveries = max(0, deliveries) if isinstance(deliveries, int) else 0  # workers that were lost over it
        # Workers that could not have answered it in time.
        self.passed = _workers(own["passed"]) if "passed" in own else ()
        priority = properties.get("priority")
        self.priority = priority if isinstance(priority, int) else 0

    @classmethod
    def unreadable(cls, lease: str, queue: str, payload: bytes, error: BadRequest) -> InFlight:
        """A message that is refused with ``error``, as far as it can be read: its sender may still be told."""
        if isinstance(error, PayloadTooLarge) and len(payload) > LARGEST_READ:  # what names it is behind the body
            found = _CORRELATION.search(payload, max(0, len(payload) - wire.MAX_HEADER_BYTES))
            return cls(lease, queue, {"id": found[1].decode(errors="replace")} if found else {}, {}, "", 0.0)
        try:
            message = wire.loads_object(payload)
        except UndecodableMessage:
            message = {}
        headers, properties = message.get("headers"), message.get("properties")
        return cls(
            lease, queue, headers if isinstance(headers, dict) else {},
            properties if isinstance(properties, dict) else {}, wire.salvaged_body(message), 0.0,
        )  # fmt: skip

    # -- what the message says --------------------------------------------------------------------------------------

    def decode(self) -> tuple[list[Any], dict[str, Any], dict[str, Any]]:
        """The positional arguments, keyword arguments and canvas of the task call."""
        try:
            args, kwargs, embed = wire.loads(self.body)
        except (TypeError, ValueError):
            raise UndecodableMessage("the message's body is not a JSON list of args, kwargs and embed") from None
        if not isinstance(args, list) or not isinstance(kwargs, dict):
            raise UndecodableMessage("the message's args and kwargs are not a list and an object")
        return args, kwargs, _canvas(embed)

    def validated(self, args: list[Any], kwargs: dict[str, Any]) -> InferenceRequest:
        """The request of the call; raise :class:`BadRequest` where it, or the message's time limits, are not valid."""
        self.time_limits = _time_limits(self.headers.get("timelimit"))
        data = kwargs.get("request")
        if data is None and len(args) == 1 and isinstance(args[0], dict) and "model" in args[0]:
            data, args = args[0], []
        if not isinstance(data, dict):
            raise BadRequest(f"{TASK_NAME} needs the keyword argument request, an object")
        unknown = kwargs.keys() - {"request"}
        if unknown:
            raise BadRequest(f"{TASK_NAME} takes no argument named {', '.join(sorted(unknown))[:LONGEST_NAMES]}")
        data = {**data, "id": self.id}
        if args:
            data["inputs"] = inputs_from_previous(data.get("inputs"), args[0])
        return InferenceRequest.parse(data)

    @property
    def may_have_canvas(self) -> bool:
        """Whether others may wait for its end: steps that follow it, or a chord that it is part of."""
        return self.embed is None or carries_canvas(self.embed)

    @property
    def tenant(self) -> str:
        """Whose request it is."""
        return self.request.tenant if self.request is not None else DEFAULT_TENANT

    @property
    def list_name(self) -> str:
        """The list that it was claimed from: its lease says whether that was its tenant's lane."""
        return keys.list_of(self.queue, self.priority, self.lease.partition("/")[2] or DEFAULT_TENANT)

    @property
    def eta(self) -> float | None:
        """The time before which the request is not to run."""
        given = self.headers.get("eta")
        return None if given is None else _timestamp(given)

    @property
    def expires(self) -> float | None:
        """The time after which Celery's sender does not want it started any longer."""
        given = self.headers.get("expires")
        return None if given is None else _timestamp(given)

    @property
    def due(self) -> float:
        """The time at which it is to be looked at: to be run or, where it expires before that, to be ended."""
        eta = self.eta
        return 0.0 if eta is None else min(eta, self.expires or float("inf"))

    @property
    def expiring(self) -> bool:
        """Whether a time may come at which it is not wanted any longer."""
        request = self.request
        return (request is not None and request.deadline is not None) or self.headers.get("expires") is not None

    def last_moment(self) -> float | None:
        """The earlier of the deadline and ``expires``: it is not to be started later."""
        expires, deadline = self.expires, self.request.deadline if self.request else None
        if expires is None or deadline is None:
            return deadline if expires is None else expires
        return min(expires, deadline)

    def record_extra(self) -> dict[str, Any]:
        """What Celery adds to the result record of a task in a group or a chain."""
        extra = {}
        if self.headers.get("group"):
            extra["group_id"] = self.headers["group"]
        if self.headers.get("parent_id"):
            extra["parent_id"] = self.headers["parent_id"]
        return extra

    def envelope(self, queue: str) -> dict[str, Any]:
        """The message again, addressed to ``queue``."""
        return {
            "body": self.body,
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": dict(self.headers),
            "properties": {
                **self.properties,
                "body_encoding": None,
                "delivery_info": {"exchange": "", "routing_key": queue},
                "delivery_tag": self.id,
            },
        }

    # -- what Celery's worker state and remote control read ---------------------------------------------------------

    @property
    def task_name(self) -> str:
        """The task's name."""
        return TASK_NAME

    def info(self, safe: bool = False) -> dict[str, Any]:
        """What ``celery inspect`` shows: no inputs."""
        return {
            "id": self.id,
            "name": TASK_NAME,
            "args": [],
            "kwargs": {},
            "type": TASK_NAME,
            "hostname": getattr(self.task.app, "hostname", None) if self.task is not None else None,
            "time_start": self.started or None,
            "acknowledged": False,
            "delivery_info": {"exchange": "", "routing_key": self.queue, "priority": self.priority},
            "worker_pid": os.getpid() if self.started else None,
        }


def inputs_from_previous(inputs: object, previous: object) -> object:
    """In a chain, a request that leaves its inputs out works on what the step before it answered."""
    if inputs:
        return inputs
    steps = previous if isinstance(previous, list) else [previous]
    texts = []
    for step in steps:
        outputs = step.get("outputs") if isinstance(step, dict) else None
        text = outputs.get("text") if isinstance(outputs, dict) else step
        if not isinstance(text, str):
            raise BadRequest(
                "the request has no inputs, and the step before it answered no text to take in their place"
            )
        texts.append(text)
    joined = "\n".join(texts)
    return {"prompt": joined, "texts": texts, "messages": [{"role": "user", "content": joined}]}


def carries_canvas(embed: Mapping[str, Any]) -> bool:
    """Whether a call has others that follow it."""
    return any(embed.values()) and any(embed.get(part) for part in CANVAS)


def _canvas(embed: object) -> dict[str, Any]:
    """The canvas of a call; raise :class:`UndecodableMessage` where its parts are not signatures."""
    if not isinstance(embed, dict):
        return {}
    if not any(embed.values()):
        return embed
    for part in ("chain", "callbacks", "errbacks"):
        steps = embed.get(part)
        if steps is not None and not (isinstance(steps, list) and all(map(_is_signature, steps))):
            raise UndecodableMessage(f"the message's {part} is not a list of signatures")
    if embed.get("chord") is not None and not isinstance(embed["chord"], dict):
        raise UndecodableMessage("the message's chord is not a signature")
    return embed


def _is_signature(step: object) -> bool:
    return isinstance(step, dict) and isinstance(step.get("task"), str)


def _hops(value: object) -> list[Hop]:
    """The history in a header; what is no history is none: it must not keep a request from being answered."""
    try:
        return [Hop.model_validate(hop) for hop in value] if isinstance(value, list) else []
    except ValidationError:
        return []


def _workers(value: object) -> tuple[str, ...]:
    """The ids in a header; what is no list of ids names nobody."""
    if not isinstance(value, list):
        return ()
    return tuple(name for name in value[:MOST_PASSED] if isinstance(name, str))


def _time_limits(value: object) -> TimeLimits:
    """The time limits in a header; none is what Celery writes where its sender gave none."""
    if value is None or value == [None, None]:
        return None, None
    if not isinstance(value, list) or len(value) != len(("hard", "soft")) or not all(map(_is_duration, value)):
        raise BadRequest("timelimit must be the hard and the soft time limit, each in seconds or null")
    hard, soft = value
    return hard or None, soft or None


def _is_duration(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and value >= 0)


def _timestamp(value: object) -> float:
    try:
        if isinstance(value, int | float):
            seconds = float(value)
        else:
            when = datetime.fromisoformat(str(value))
            seconds = (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise BadRequest("eta and expires must be ISO 8601 times") from None
    if abs(seconds) > LATEST:
        raise BadRequest("eta and expires must be before the year 10000")
    return seconds
