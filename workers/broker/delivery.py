"""Claim, lease, outcome: the commands that move a request through the broker without losing it.

A claim moves messages from their queue to leases in one step. A lease is kept alive while the message waits or runs in
this process. An outcome ends the lease and writes what comes next in one step, or does nothing at all when the lease
is no longer ours. So a request gets exactly one terminal record wherever a process dies.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from secrets import token_hex
from typing import Any, NamedTuple, Protocol

import orjson
import redis

from shared import keys
from shared.broker import lua
from shared.clock import BrokerClock
from shared.contract import DEFAULT_TENANT, EngineName
from shared.limits import Limits, LimitsInForce
from shared.settings import FleetSettings, Settings, TenantSettings
from workers.broker.lease_ids import LeaseTokens
from workers.broker.lost_claims import LostClaims
from workers.broker.pipelined import PipelinedScripts

SAME = "="
"""In an outcome: the list or the message as it was claimed."""

SWEEP_LIMIT = 1000
"""Expired leases that one sweep takes over."""

LEFT_TO_WORKER_SECONDS = 0.25
"""For how long after its deadline a request is left to the worker that may have it."""

UNREAD_LIMIT = 250
"""Messages of other senders that are read at once."""

WATCH_SHARE = 0.8
"""Share of the time between two sweeps of a worker for which it watches for all what is due next."""

COURTESY_SECONDS = 0.5
"""How long a message that one worker should have waits for it before any other may claim it."""


class LeasedMessage(NamedTuple):
    """One message that is now leased to this process."""

    lease: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Claim:
    """What a claim brought.

    ``now`` is the broker's clock in seconds (0 where there was nothing to claim), ``waiting`` whether more is left that
    may be claimed, ``left_out`` how many tenants have their share of what is in flight, ``cancelled`` when a request
    was cancelled last, by the same clock (0: none is known).
    """

    now: float
    waiting: bool
    left_out: int
    cancelled: float
    messages: list[LeasedMessage]


@dataclass(slots=True)
class Settlement:
    """What ends a lease: what is written, and where its message goes. For a request :mod:`workers.ends` makes it.

    Not frozen, though nobody changes it: one is made for each request, and a frozen one takes three times as long.
    """

    lease: str
    result_key: str = ""
    record: bytes | str = ""
    reply: str = ""
    push_list: str = ""
    push_message: bytes | str = ""
    push_front: bool = False
    dead_reason: str = ""
    due_ms: float | None = None
    request_id: str = ""
    deadline: Deadline | None = None
    cancelled: bool = False

    @classmethod
    def give_back(cls, lease: str, message: bytes | str = SAME) -> Settlement:
        """The message returns to the front of its queue, as it was or as it is given."""
        return cls(lease, push_list=SAME, push_message=message, push_front=True)

    def terms(self, payloads: list[bytes | str]) -> dict[str, Any]:
        """As ``settle.lua`` takes it. What is long goes to ``payloads``, and its place there stands for it."""
        terms: dict[str, Any] = {"lease": self.lease}
        if self.request_id:
            terms["id"] = self.request_id
        if self.result_key:
            payloads.append(self.record)
            terms |= {"result": self.result_key, "record": len(payloads)}
            if self.cancelled:
                terms["cancel"] = True
        elif self.record and self.reply:
            payloads.append(self.record)
            terms["record"] = len(payloads)
        if self.reply:
            terms["reply"] = self.reply
        if self.push_list:
            terms |= {"list": self.push_list, "front": self.push_front}
            if self.push_message != SAME:
                payloads.append(self.push_message)
                terms["message"] = len(payloads)
        if self.dead_reason:
            terms["reason"] = self.dead_reason
        if self.due_ms is not None:
            terms["due"] = self.due_ms
        if self.deadline is not None:
            terms |= {"deadline": self.deadline.at * 1000, "entry": self.deadline.entry}
        return terms


class Written(IntEnum):
    """What came of a settlement."""

    LOST = 0
    """The lease was no longer ours: nothing was written."""
    DONE = 1
    CANCELLED = 2
    """The lease has ended, but the request had been cancelled: that record stands."""
    ANSWERED = 3
    """The lease has ended, but the request had its answer: that record stands."""


class Verdict(StrEnum):
    """Whether a message may run, waits for another of its id, or is of a request that was answered or cancelled."""

    RUN = "run"
    WAIT = "wait"
    DONE = "done"
    REVOKED = "revoked"


@dataclass(frozen=True, slots=True)
class Swept:
    """A message that this process took over: its lease expired or, with a ``deadline``, it waited for too long.

    ``list_name`` is where it came from; the deadline is in seconds of the broker's clock.
    """

    lease: str
    list_name: str
    payload: bytes
    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class Deadline:
    """Until when a request is wanted that is, or was, on a list; ``at`` is in seconds of the broker's clock."""

    request_id: str
    list_name: str
    at: float

    @property
    def entry(self) -> str:
        """Its name among the others."""
        return f"{self.request_id}\n{self.list_name}"


def lease_order(lease: str) -> int:
    """Sorts leases, and what waits under them, in the order in which they were made: a counter begins their names."""
    number = lease.removeprefix(keys.DELAYED_PREFIX).partition("-")[0]
    return int(number) if number.isdecimal() else 0


class Delivery(Protocol):
    """The commands, as the rest of a worker knows them. Each raises what a broker that fails raises.

    There are two: :class:`RedisDelivery`, and :class:`workers.broker.memory.MemoryDelivery` for tests of the rules. One
    contract suite runs over both. What ends in ``soon`` is for the loop: the answer is given to ``then`` when it comes;
    where none will come ``lost`` is called, and the command was carried out, or was not.
    """

    lease_seconds: float

    def claim(self, queue: str, limit: int) -> Claim:
        """Lease up to ``limit`` messages of ``queue``, the most urgent and oldest first."""

    def claim_soon(self, queue: str, limit: int, then: Callable[[Claim], None], lost: Callable[[], None]) -> None:
        """The same, while the loop goes on."""

    def begin(self, messages: Sequence[tuple[str, str, str]]) -> list[Verdict]:
        """Whether messages, each a lease, an id and a content's digest, may run: for those of other senders."""

    def settle(self, settlements: Sequence[Settlement]) -> list[Written]:
        """End leases, and write what follows; says what came of each."""

    def settle_soon(
        self, settlements: Sequence[Settlement], then: Callable[[list[Written]], None], lost: Callable[[], None]
    ) -> None:
        """The same, while the loop goes on. What was ``lost`` may be settled again: what was written stands."""

    def wait(self) -> None:
        """Take in what has become of all that was sent so far."""

    def cancelled_among(self, request_ids: Sequence[str]) -> set[str]:
        """Which of these requests were cancelled."""

    def sweep(self) -> tuple[float | None, list[Swept]]:
        """Take over expired leases and put due delayed messages back.

        Returns the seconds until the next one is due (infinite where there is none, ``None`` where another worker
        watches) and what was taken over.
        """

    def late(self) -> tuple[float, list[Swept]]:
        """Take over requests whose deadline has passed while they wait on a list.

        Returns the seconds until it is worth asking again (infinite where no deadline is known) and what was taken
        over. For who watches.
        """

    def unread(self) -> tuple[bool, list[tuple[str, bytes]]]:
        """What others than our client have put on lists since the last time: each message with its list.

        Says too whether there is more. For who watches.
        """

    def deadlines(self, deadlines: Sequence[Deadline]) -> list[float]:
        """Note until when requests are wanted. Returns what counts, in seconds: what was noted before stands."""

    def share_out(self, places: int) -> None:
        """Reckon what each tenant may have in flight of this many places in the fleet."""

    def secret(self) -> bytes:
        """What the fleet's workers seal with, and when it was made, for :class:`workers.broker.seal.Seal`."""


Quotas = dict[str, tuple[float, int]]
"""By tenant (``*`` is everybody who is not named): its weight, and how many may be in flight (0: any number)."""


def quotas_of(tenants: Mapping[str, TenantSettings], places: int) -> Quotas:
    """The quotas of the tenants in a fleet with so many places."""
    return {
        "" if tenant == DEFAULT_TENANT else tenant: (
            rule.weight, 0 if rule.in_flight_share is None else max(1, int(rule.in_flight_share * places)),
        )
        for tenant, rule in tenants.items()
    }  # fmt: skip


class RedisDelivery:
    """The scripts over one broker connection pool. From any thread; the loop uses what ends in ``soon``.

    Messages that the worker with this ``affinity`` should have are claimed before others. ``token`` makes what the ids
    of one script's leases end with; the ``clock`` learns from the broker's answers.
    """

    def __init__(
        self,
        client: redis.Redis,
        fleet: FleetSettings,
        limits: LimitsInForce | None = None,
        affinity: str = "",
        token: Callable[[], str] | None = None,
        clock: BrokerClock | None = None,
    ) -> None:
        self.clock = clock or BrokerClock()
        self.affinity = affinity
        self._fleet = fleet
        self._limits = limits or LimitsInForce(Limits.of(Settings(fleet=fleet)))
        self.lease_seconds = fleet.lease_seconds
        self._lease_ms = int(fleet.lease_seconds * 1000)
        self._watch_ms = max(1, int(WATCH_SHARE * fleet.sweep_seconds * 1000))
        self._settle_keys = [
            keys.LEASE_INDEX, keys.LEASE_MESSAGES, keys.DEAD_LETTERS, keys.IN_FLIGHT, keys.UNDER_WAY, keys.DELAYED,
            keys.CONTENTS, keys.DEADLINES, keys.CANCELLED,
        ]  # fmt: skip
        self._claim_keys: dict[str, list[str]] = {}
        self._token = token or LeaseTokens()
        self._client = client
        self.scripts = PipelinedScripts(client)
        self.quotas = ""
        self._claim = client.register_script(lua("workers.broker", "claim"))
        self._begin = client.register_script(lua("workers.broker", "begin"))
        self._settle = client.register_script(lua("workers.broker", "settle"))
        self._sweep = client.register_script(lua("workers.broker", "sweep"))
        self._seal = client.register_script(lua("workers.broker", "seal"))
        claimed = client.register_script(lua("workers.broker", "claimed"))
        self._lost = LostClaims(
            lambda tokens: [
                lease.decode() for lease in claimed(keys=[keys.LEASE_INDEX], args=[self._lease_ms, *tokens])
            ],
            fleet.lease_seconds,
        )
        self._late = client.register_script(lua("workers.broker", "late"))
        self._late_from: tuple[bytes | str, int] = "", 0
        self._unread = client.register_script(lua("workers.broker", "unread"))
        self._deadlines = client.register_script(lua("workers.broker", "deadlines"))

    def secret(self) -> bytes:
        """What the fleet's workers seal with, and when it was made, for :class:`workers.broker.seal.Seal`."""
        return bytes(self._seal(keys=[keys.SEAL], args=[token_hex(32)]))

    def wait(self) -> None:
        """Take in what has become of all that was sent so far."""
        self.scripts.wait()

    def share_out(self, places: int) -> None:
        """Reckon what each tenant may have in flight of this many places in the fleet."""
        rules = quotas_of(self._limits.now.tenants, places)
        self.quotas = json.dumps(rules) if rules else ""

    def claim(self, queue: str, limit: int) -> Claim:
        """Lease up to ``limit`` messages of ``queue``, the most urgent and oldest first."""
        names, args = self._claim_terms(queue, limit)
        try:
            return _claim_of(self._claim(keys=names, args=args))
        except redis.RedisError:
            self._lost.add(str(args[-1]))
            raise

    def claim_soon(
        self,
        queue: str,
        limit: int,
        then: Callable[[Claim], None],
        lost: Callable[[], None],
        scripts: PipelinedScripts | None = None,
    ) -> None:
        """The same by a pipelined connection, which brings news of the queue's lists once they were found empty."""
        names, args = self._claim_terms(queue, limit)

        def unanswered() -> None:
            self._lost.add(str(args[-1]))
            lost()

        (scripts or self.scripts).run(self._claim, names, args, lambda rows: then(_claim_of(rows)), unanswered)

    def give_back_lost(self) -> None:
        """Give back what claims have leased whose answers were lost. To be called often; it seldom asks the broker."""
        self.settle([Settlement.give_back(lease) for lease in reversed(self._lost.leases())])

    def pipeline(self) -> PipelinedScripts:
        """A pipelined connection for claims outside the loop."""
        return PipelinedScripts(self._client)

    def _claim_terms(self, queue: str, limit: int) -> tuple[list[str], list[str | int]]:
        names = self._claim_keys.get(queue)
        if names is None:
            leases = [keys.LEASE_INDEX, keys.LEASE_MESSAGES, keys.LEASE_COUNTER, keys.CANCELLED]
            names = [*leases, keys.queue_state(queue), keys.IN_FLIGHT, *keys.lists_of(queue), *keys.lanes_of(queue)]
            self._claim_keys[queue] = names
        patience = self._limits.now.starvation_limit
        courtesy = int(COURTESY_SECONDS * 1000)
        return names, [limit, self._lease_ms, patience, self.quotas, self.affinity, courtesy, self._token()]

    def settle(self, settlements: Sequence[Settlement]) -> list[Written]:
        """End leases, and write what follows; says what came of each."""
        if not settlements:
            return []
        return _written(self._settle(keys=self._settle_keys, args=self._settle_terms(settlements)))

    def settle_soon(
        self, settlements: Sequence[Settlement], then: Callable[[list[Written]], None], lost: Callable[[], None]
    ) -> None:
        """The same by the pipelined connection. What was ``lost`` may be settled again: what was written stands."""
        args = self._settle_terms(settlements)
        pushes = any(settlement.push_list for settlement in settlements)
        frees = any("/" in settlement.lease for settlement in settlements)  # of a tenant

        def answered(flags: list[int]) -> None:
            if pushes:
                self.scripts.doubt()
            elif frees:
                self.scripts.freed()
            then(_written(flags))

        self.scripts.run(self._settle, self._settle_keys, args, answered, lost)

    def _settle_terms(self, settlements: Sequence[Settlement]) -> list[bytes | str]:
        payloads: list[bytes | str] = []
        terms = {
            "ttl": self._fleet.result_expires_seconds,
            "dead_capacity": self._fleet.dead_letter_capacity,
            "dead_bytes": self._fleet.dead_letter_capacity_bytes,
            "delayed": keys.DELAYED_PREFIX,
            "leases": [settlement.terms(payloads) for settlement in settlements],
        }
        return [orjson.dumps(terms), *payloads]

    def begin(self, messages: Sequence[tuple[str, str, str]]) -> list[Verdict]:
        """Whether messages, each a lease, an id and a content's digest, may run: for those of other senders."""
        if not messages:
            return []
        args: list[str | int] = [self._fleet.result_expires_seconds]
        for message in messages:
            args.extend(message)
        names = [keys.LEASE_INDEX, keys.UNDER_WAY, keys.CONTENTS, keys.CANCELLED]
        return [Verdict(word.decode()) for word in self._begin(keys=names, args=args)]

    def cancelled_among(self, request_ids: Sequence[str]) -> set[str]:
        """Which of these requests were cancelled."""
        if not request_ids:
            return set()
        scores = self._client.zmscore(keys.CANCELLED, [keys.result_key(request_id) for request_id in request_ids])
        return {request_id for request_id, score in zip(request_ids, scores, strict=True) if score is not None}

    def sweep(self) -> tuple[float | None, list[Swept]]:
        """Take over expired leases and put due delayed messages back.

        Returns the seconds until the next one is due (infinite where there is none, ``None`` where another worker
        watches) and what was taken over.
        """
        leases = [keys.LEASE_INDEX, keys.LEASE_MESSAGES, keys.LEASE_COUNTER, keys.DELAYED, keys.CANCELLED]
        args = [SWEEP_LIMIT, self._lease_ms, keys.DELAYED_PREFIX, self._token(), self.affinity, self._watch_ms]
        asked = self.clock.steady()
        rows = self._sweep(keys=[*leases, keys.SWEEPING, keys.RELEASED], args=args)
        self.clock.learn(rows[1] / 1e6, asked, self.clock.steady())
        taken = []
        for lease, stored in zip(rows[2::2], rows[3::2], strict=True):
            name, _, payload = stored.partition(b"\n")
            taken.append(Swept(lease.decode(), name.decode(), payload))
        return _SEEN.get(rows[0], rows[0] / 1000), taken

    def late(self) -> tuple[float, list[Swept]]:
        """Take over requests whose deadline has passed while they wait on a list.

        Returns the seconds until it is worth asking again (infinite where no deadline is known) and what was taken
        over. For who watches.
        """
        leases = [keys.LEASE_INDEX, keys.LEASE_MESSAGES, keys.LEASE_COUNTER, keys.IN_FLIGHT]
        args = [self._lease_ms, self._token(), int(LEFT_TO_WORKER_SECONDS * 1000), *self._late_from]
        rows = self._late(keys=[*leases, keys.DEADLINES, keys.LOOKED], args=args)
        self._late_from = rows[2], rows[3]
        taken = []
        for lease, deadline, stored in zip(rows[4::3], rows[5::3], rows[6::3], strict=True):
            name, _, payload = stored.partition(b"\n")
            taken.append(Swept(lease.decode(), name.decode(), payload, int(deadline) / 1000))
        return (float("inf") if rows[0] < 0 else rows[0] / 1000), taken

    def unread(self) -> tuple[bool, list[tuple[str, bytes]]]:
        """What others than our client have put on lists since the last time: each message with its list.

        Says too whether there is more. For who watches.
        """
        lists = [name for engine in EngineName for name in keys.lists_of(keys.queue_of(engine))]
        rows = self._unread(keys=[keys.LOOKED, *lists], args=[UNREAD_LIMIT])
        return rows[0] == 1, [(name.decode(), payload) for name, payload in zip(rows[1::2], rows[2::2], strict=True)]

    def deadlines(self, deadlines: Sequence[Deadline]) -> list[float]:
        """Note until when requests are wanted. Returns what counts, in seconds: what was noted before stands."""
        if not deadlines:
            return []
        args = [word for one in deadlines for word in (one.entry, one.at * 1000)]
        return [float(score) / 1000 for score in self._deadlines(keys=[keys.DEADLINES], args=args)]


_SEEN: Mapping[int, float | None] = {-1: float("inf"), -2: None}
"""What a sweep says in place of a time."""


def _claim_of(rows: list[Any]) -> Claim:
    messages = [LeasedMessage(lease.decode(), payload) for lease, payload in zip(rows[4::2], rows[5::2], strict=True)]
    return Claim(rows[0] / 1000, rows[1] > 0, rows[2], rows[3] / 1000, messages)


def _written(flags: list[int]) -> list[Written]:
    return [Written(flag) for flag in flags]
