"""Claim, lease, outcome: the commands that move a request through the broker without losing it.

A claim moves messages from their queue to leases in one step. A lease is kept alive while the message waits or runs in
this process. An outcome ends the lease and writes what comes next in one step, or does nothing at all when the lease
is no longer ours. So a request gets exactly one terminal record wherever a process dies.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import redis

from shared import keys
from shared.broker import lua
from shared.contract import DEFAULT_TENANT
from shared.settings import FleetSettings
from workers.broker.pipelined import PipelinedScripts

SAME = "="
"""In an outcome: the list or the message as it was claimed."""

SWEEP_LIMIT = 100

LEFT_OUT_SECONDS = 0.02
"""After how long a tenant that had its share of what is in flight is looked at again."""


@dataclass(frozen=True, slots=True)
class LeasedMessage:
    """One message that is now leased to this process."""

    lease: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Claim:
    """What a claim brought.

    ``now`` is the broker's clock in seconds (0 where there was nothing to claim), ``waiting`` whether more is left that
    may be claimed, ``left_out`` how many tenants have their share of what is in flight, ``cancelled`` how many
    cancellations are remembered.
    """

    now: float
    waiting: bool
    left_out: int
    cancelled: int
    messages: list[LeasedMessage]


@dataclass(frozen=True, slots=True)
class Settlement:
    """How a lease ends. Build one with the functions of :mod:`workers.ends.ending`."""

    lease: str
    result_key: str = ""
    record: bytes | str = ""
    reply: str = ""
    push_list: str = ""
    push_message: bytes | str = ""
    push_front: bool = False
    dead_reason: str = ""
    due_ms: int | None = None

    @classmethod
    def give_back(cls, lease: str) -> Settlement:
        """The message returns to the front of its queue as it was."""
        return cls(lease, push_list=SAME, push_message=SAME, push_front=True)

    def arguments(self) -> tuple[str | bytes | int, ...]:
        """As ``settle.lua`` takes it."""
        return (
            self.lease,
            self.result_key,
            self.record,
            self.reply,
            self.push_list,
            self.push_message,
            "R" if self.push_front else "L",
            self.dead_reason,
            "" if self.due_ms is None else self.due_ms,
        )


class Verdict(StrEnum):
    """Whether a message may run, must wait for another of the same id, or is of a request that has its answer."""

    RUN = "run"
    WAIT = "wait"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class Swept:
    """An expired lease that this process took over. ``list_name`` is where its message came from."""

    lease: str
    list_name: str
    payload: bytes


class Delivery:
    """The scripts over one broker connection pool. From any thread; the loop uses what ends in ``soon``."""

    def __init__(self, client: redis.Redis, fleet: FleetSettings) -> None:
        self._fleet = fleet
        self.lease_seconds = fleet.lease_seconds
        self._lease_ms = int(fleet.lease_seconds * 1000)
        self._settle_keys = [keys.LEASE_INDEX, keys.LEASE_MESSAGES, keys.DEAD_LETTERS, keys.IN_FLIGHT, keys.UNDER_WAY]
        self._claim_keys: dict[str, list[str]] = {}
        self._client = client
        self.scripts = PipelinedScripts(client)
        self.quotas = ""
        self._claim = client.register_script(lua("workers.broker", "claim"))
        self._begin = client.register_script(lua("workers.broker", "begin"))
        self._settle = client.register_script(lua("workers.broker", "settle"))
        self._sweep = client.register_script(lua("workers.broker", "sweep"))

    def share_out(self, places: int) -> None:
        """Reckon what each tenant may have in flight of this many places in the fleet."""
        rules = {
            "" if tenant == DEFAULT_TENANT else tenant: (
                rule.weight, 0 if rule.in_flight_share is None else max(1, int(rule.in_flight_share * places)),
            )
            for tenant, rule in self._fleet.tenants.items()
        }  # fmt: skip
        self.quotas = json.dumps(rules) if rules else ""

    def claim(self, queue: str, limit: int) -> Claim:
        """Lease up to ``limit`` messages of ``queue``, the most urgent and oldest first."""
        names, args = self._claim_terms(queue, limit)
        return _claim_of(self._claim(keys=names, args=args))

    def claim_soon(
        self, queue: str, limit: int, then: Callable[[Claim], None], lost: Callable[[], None], scripts: PipelinedScripts
    ) -> None:
        """The same by a pipelined connection, which brings news of the queue's lists once they were found empty."""
        names, args = self._claim_terms(queue, limit)
        scripts.run(self._claim, names, args, lambda rows: then(_claim_of(rows)), lost)

    def pipeline(self) -> PipelinedScripts:
        """A pipelined connection for claims outside the loop."""
        return PipelinedScripts(self._client)

    def _claim_terms(self, queue: str, limit: int) -> tuple[list[str], list[str | int]]:
        names = self._claim_keys.get(queue)
        if names is None:
            leases = [keys.LEASE_INDEX, keys.LEASE_MESSAGES, keys.LEASE_COUNTER, keys.CANCELLED]
            names = [*leases, keys.queue_state(queue), keys.IN_FLIGHT, *keys.lists_of(queue), *keys.lanes_of(queue)]
            self._claim_keys[queue] = names
        return names, [limit, self._lease_ms, self._fleet.starvation_limit, self.quotas]

    def settle(self, outcomes: Sequence[Settlement]) -> list[bool]:
        """Write outcomes; ``False`` where the lease was no longer ours and nothing was written."""
        if not outcomes:
            return []
        return _written(self._settle(keys=self._settle_keys, args=self._settle_terms(outcomes)))

    def settle_soon(
        self, outcomes: Sequence[Settlement], then: Callable[[list[bool]], None], lost: Callable[[], None]
    ) -> None:
        """The same by the pipelined connection. What was ``lost`` may be settled again: what was written stands."""
        args = self._settle_terms(outcomes)
        self.scripts.run(self._settle, self._settle_keys, args, lambda flags: then(_written(flags)), lost)

    def _settle_terms(self, outcomes: Sequence[Settlement]) -> list[str | bytes | int]:
        args: list[str | bytes | int] = [
            self._fleet.result_expires_seconds,
            self._fleet.dead_letter_capacity,
            keys.DELAYED_PREFIX,
        ]
        for outcome in outcomes:
            args.extend(outcome.arguments())
        return args

    def begin(self, messages: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Whether messages, each a lease and a request id, may run: for those that others than our client have sent."""
        if not messages:
            return []
        args: list[str | int] = [self._fleet.result_expires_seconds]
        for message in messages:
            args.extend(message)
        return [Verdict(word.decode()) for word in self._begin(keys=[keys.LEASE_INDEX, keys.UNDER_WAY], args=args)]

    def cancelled_among(self, request_ids: Sequence[str]) -> set[str]:
        """Which of these requests were cancelled."""
        if not request_ids:
            return set()
        scores = self._client.zmscore(keys.CANCELLED, [keys.result_key(request_id) for request_id in request_ids])
        return {request_id for request_id, score in zip(request_ids, scores, strict=True) if score is not None}

    def sweep(self) -> tuple[float | None, list[Swept]]:
        """Take over expired leases and put due delayed messages back.

        Returns the seconds until the next one is due (``None``: there is none) and what was taken over.
        """
        leases = [keys.LEASE_INDEX, keys.LEASE_MESSAGES, keys.LEASE_COUNTER]
        rows = self._sweep(keys=leases, args=[SWEEP_LIMIT, self._lease_ms, keys.DELAYED_PREFIX])
        taken = []
        for lease, stored in zip(rows[1::2], rows[2::2], strict=True):
            name, _, payload = stored.partition(b"\n")
            taken.append(Swept(lease.decode(), name.decode(), payload))
        return (None if rows[0] < 0 else rows[0] / 1000), taken


def _claim_of(rows: list[Any]) -> Claim:
    messages = [LeasedMessage(lease.decode(), payload) for lease, payload in zip(rows[4::2], rows[5::2], strict=True)]
    return Claim(rows[0] / 1000, rows[1] > 0, rows[2], rows[3], messages)


def _written(flags: list[int]) -> list[bool]:
    return [flag == 1 for flag in flags]
