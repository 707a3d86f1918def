"""From checked requests to messages on the queues: one atomic script, each id once, no queue past its capacity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from producer.client.steps import Steps, run_script
from producer.client.submission import Submission
from shared import keys, wire
from shared.broker import broker_errors, lua
from shared.contract import DEFAULT_TENANT, EngineName
from shared.direct import Script
from shared.errors import IdConflict, QueueFull, QuotaExceeded
from shared.identity import content_of
from shared.settings import Settings, TenantSettings
from shared.signing import Signer

UNKNOWN_WAIT_SECONDS = 1.0
"""When to try again where nothing is known of the rate at which a queue empties."""

LONGEST_WAIT_SECONDS = 60.0
SHOWN_IDS = 5
SCRIPT_KEYS = (keys.UNDER_WAY, keys.CONTENTS, keys.CANCELLED, keys.DOUBTED, keys.DEADLINES)
LARGEST_GROUP = 1000
"""Requests for one list that the script looks at together."""

ANYBODY = TenantSettings()


@dataclass(slots=True)
class _Group:
    """What goes to one list: ids, digests and messages in turn, and the places of its requests among those given."""

    name: str
    tenant: str
    arguments: list[str | bytes] = field(default_factory=list)
    places: list[int] = field(default_factory=list)


class Submitter:
    """Pushes requests. Safe to use from several threads."""

    def __init__(self, settings: Settings, reply: str) -> None:
        self._fleet = settings.fleet
        self._capacity = settings.queue_capacity
        self._reply = reply
        signer = Signer(settings.fleet.signing_key)
        self._sign = signer.sign if signer else None
        self._script = Script.of(lua("shared", "submit"))

    def submit(self, submissions: Sequence[tuple[Submission, EngineName]], sent: float) -> Steps[list[bool]]:
        """Push all of them or none; ``False`` for one whose id is under way or has its answer.

        Raises :class:`~shared.errors.IdConflict` where an id stands for another request,
        :class:`~shared.errors.QueueFull` and :class:`~shared.errors.QuotaExceeded`, which say when to try again,
        :class:`~shared.errors.PayloadTooLarge` and :class:`~shared.errors.BrokerUnavailable`.
        """
        groups: dict[str, _Group] = {}
        everything: list[_Group] = []
        for place, (submission, engine) in enumerate(submissions):
            request = submission.request
            queue = keys.queue_of(engine)
            name = keys.list_of(queue, request.priority.wire, request.tenant)
            group = groups.get(name)
            if group is None or len(group.places) == LARGEST_GROUP:
                group = groups[name] = _Group(name, request.tenant)
                everything.append(group)
            group.places.append(place)
            content = content_of(request)
            group.arguments += (request.id, content, wire.encode_request(
                request, queue, sent=sent, content=content, reply=self._reply, max_bytes=self._fleet.max_payload_bytes,
                sign=self._sign, headers=submission.headers,
            ))  # fmt: skip
        if not everything:
            return []
        fleet = self._fleet
        args: list[Any] = [fleet.result_expires_seconds, self._capacity, fleet.queue_capacity_bytes]
        deadlines = {
            submission.request.id: submission.request.deadline * 1000
            for submission, _ in submissions
            if submission.request.deadline is not None
        }
        args.append(wire.dumps(deadlines) if deadlines else "")
        args.append(int(any(submission.tried for submission, _ in submissions)))
        for group in everything:
            args += (group.name, *self._rate(group.tenant), len(group.places))
            args += group.arguments
        with broker_errors(fleet, "submit"):
            answer = yield from run_script(self._script, SCRIPT_KEYS, args)
        if answer[0] != b"ok":
            raise self._refusal(answer, len(submissions))
        pushed = [False] * len(submissions)
        places = (place for group in everything for place in group.places)
        for place, flag in zip(places, answer[1:], strict=True):
            pushed[place] = flag == 1
        return pushed

    def _rate(self, tenant: str) -> tuple[float, int]:
        """Requests a second that a tenant may submit (0: any number), and how many at once."""
        tenants = self._fleet.tenants
        rule = (tenants.get(tenant) or tenants.get("*") or ANYBODY) if tenants else ANYBODY
        rate = rule.requests_per_second
        return (0, 0) if rate is None else (rate, rule.burst or max(1, int(rate)))

    def _refusal(self, answer: list[Any], count: int) -> IdConflict | QueueFull | QuotaExceeded:
        if answer[0] == b"conflict":
            ids = ", ".join(word.decode() for word in answer[1 : 1 + SHOWN_IDS])
            more = f" and {len(answer) - 1 - SHOWN_IDS} more" if len(answer) - 1 > SHOWN_IDS else ""
            return IdConflict(
                f"{ids}{more}: submitted before with another model, kind, inputs or parameters; give this request "
                "another id"
            )
        if answer[0] == b"rate":
            tenant = answer[1].decode() or DEFAULT_TENANT
            retry_after = min(LONGEST_WAIT_SECONDS, answer[2] / 1000)
            return QuotaExceeded(
                f"tenant {tenant!r} submits more than its quota (fleet.tenants); try again in {retry_after:.2f} s",
                retry_after,
            )
        queue, waiting, wait_ms = answer[1].decode(), answer[2], answer[3]
        retry_after = UNKNOWN_WAIT_SECONDS if wait_ms < 0 else min(LONGEST_WAIT_SECONDS, max(0.01, wait_ms / 1000))
        text = (
            f"{count} more do not fit the {queue} queue, on which {waiting} requests wait (fleet.queue_capacity is "
            f"{self._capacity}, queue_capacity_bytes {self._fleet.queue_capacity_bytes})"
        )
        return QueueFull(f"{text}; try again in {retry_after:.2f} s", retry_after)
