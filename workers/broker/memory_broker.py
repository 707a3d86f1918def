"""What a broker holds and what the scripts in ``lua/`` do to it, in memory. What they let expire is kept for ever."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import orjson

from shared import keys
from shared.errors import IdConflict
from workers.broker.delivery import (
    LEFT_TO_WORKER_SECONDS,
    SAME,
    SWEEP_LIMIT,
    Claim,
    Deadline,
    LeasedMessage,
    Quotas,
    Settlement,
    Swept,
    Verdict,
    Written,
    lease_order,
)
from workers.broker.memory_queues import MemoryQueues

STANDS: Mapping[str, Written] = {
    "SUCCESS": Written.ANSWERED,
    "FAILURE": Written.ANSWERED,
    "REVOKED": Written.CANCELLED,
}
"""The states of a record that no other replaces, and what comes of a settlement that finds one."""

FORGOTTEN_MS = 10_000
"""After how long a deadline is forgotten whose request is on no list."""

LEASES_OF = "memory"
"""What the ids of leases end with. They need be like no others, for nothing that is in memory outlives them."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A message that somebody has, or one that waits for its time. ``expiry`` is in ms since the epoch."""

    list_name: str
    message: bytes
    expiry: float


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that was given up."""

    list_name: str
    reason: str
    message: bytes


class MemoryBroker:
    """One broker, which several workers may share. ``clock`` tells seconds since the epoch."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last = 0
        self._running: dict[str, str] = {}
        self.queues = MemoryQueues(clock)
        self.leases: dict[str, Lease] = {}
        self.records: dict[str, bytes] = {}
        self.published: list[tuple[str, bytes]] = []
        self.replies: defaultdict[str, list[bytes]] = defaultdict(list)
        self.dead: list[DeadLetter] = []
        self.cancelled: dict[str, int] = {}
        self.delayed: dict[str, str] = {}
        self.under_way: dict[str, int] = {}
        self.contents: dict[str, str] = {}
        self.deadlines: dict[str, float] = {}  # by their entries, in ms
        self.seal = b"%d:secret" % self.now

    @property
    def now(self) -> int:
        """Milliseconds since the epoch."""
        return int(self._clock() * 1000)

    # -- what a caller does -----------------------------------------------------------------------------------------

    def submit(
        self, list_name: str, request_id: str, message: bytes, content: str = "", deadline: float | None = None
    ) -> bool:
        """Push a request; ``False`` where its id is under way or has its result.

        Raises :class:`~shared.errors.IdConflict` where it stands for another content.
        """
        key = keys.result_key(request_id)
        record = orjson.loads(self.records.get(key, b"{}"))
        known = request_id in self.under_way or record.get("status") == "SUCCESS"
        before = self.contents.get(request_id) if request_id in self.under_way else record.get("content")
        if before is not None and before != content:
            raise IdConflict
        if known:
            return False
        self.records.pop(key, None)
        self.cancelled.pop(key, None)
        self.under_way[request_id] = self.now
        self.contents[request_id] = content
        self.queues.push(list_name, message, front=False)
        if deadline is not None:
            self.deadlines[Deadline(request_id, list_name, deadline).entry] = deadline * 1000
        return True

    def cancel(self, request_id: str, record: bytes) -> bool:
        """Write the record of a cancellation; ``False`` where the request had ended before."""
        key = keys.result_key(request_id)
        if self._standing(key) is not None:
            return False
        self._record(key, record)
        self.cancelled[key] = self.now
        return True

    # -- what a worker does -----------------------------------------------------------------------------------------

    def claim(self, queue: str, limit: int, lease_ms: int, patience: int, quotas: Quotas, affinity: str = "") -> Claim:
        """Move messages from their lists to leases, as ``claim.lua`` does."""
        taken = self.queues.take(queue, limit, patience, quotas, affinity)
        messages = []
        for list_name, tenant, message in taken.messages:
            lease = self._next_lease(tenant)
            self.leases[lease] = Lease(list_name, message, self.now + lease_ms)
            messages.append(LeasedMessage(lease, message))
        last = max(self.cancelled.values(), default=0)
        return Claim(self.now / 1000, bool(taken.waiting), taken.left_out, last / 1000, messages)

    def renew(self, leases: Mapping[str, float | None], lease_ms: int) -> set[str]:
        """Keep leases, each not past its last moment (seconds since the epoch), as ``renew.lua`` does.

        Returns those that are lost.
        """
        for lease, last in leases.items():
            held = self.leases.get(lease)
            if held is not None:
                expiry = self.now + lease_ms if last is None else min(self.now + lease_ms, int(last * 1000))
                self.leases[lease] = Lease(held.list_name, held.message, expiry)
        return leases.keys() - self.leases.keys()

    def begin(self, messages: Sequence[tuple[str, str, str]]) -> list[Verdict]:
        """Whether messages, each a lease, an id and a content's digest, may run, as ``begin.lua`` does."""
        return [self._verdict(*message) for message in messages]

    def _verdict(self, lease: str, request_id: str, content: str) -> Verdict:
        standing = self._standing(keys.result_key(request_id))
        if standing is not None:
            return Verdict.REVOKED if standing is Written.CANCELLED else Verdict.DONE
        if keys.result_key(request_id) in self.cancelled:
            return Verdict.REVOKED
        holder = self._running.get(request_id)
        waits = request_id in self.under_way if holder is None else holder != lease and holder in self.leases
        if waits:
            return Verdict.WAIT
        self._running[request_id] = lease
        self.under_way[request_id] = self.now
        self.contents[request_id] = content
        return Verdict.RUN

    def cancelled_among(self, request_ids: Sequence[str]) -> set[str]:
        """Which of these requests were cancelled."""
        return {request_id for request_id in request_ids if keys.result_key(request_id) in self.cancelled}

    def settle(self, settlements: Sequence[Settlement]) -> list[Written]:
        """End leases, each with what follows from it, as ``settle.lua`` does."""
        return [self._settle(settlement) for settlement in settlements]

    def _settle(self, it: Settlement) -> Written:
        lease = self.leases.pop(it.lease, None)
        if lease is None:
            return Written.LOST
        tenant = it.lease.partition("/")[2]
        if tenant:
            self.queues.in_flight[tenant] -= 1
        if it.due_ms is not None:
            delayed = keys.DELAYED_PREFIX + it.lease + (f"\n{it.request_id}" if it.request_id else "")
            self.leases[delayed] = Lease(lease.list_name, lease.message, it.due_ms)
            if it.request_id:
                self.delayed[it.request_id] = delayed
        if it.deadline is not None:
            self.deadlines.pop(it.deadline.entry, None)
            name = lease.list_name if it.push_list == SAME or it.due_ms is not None else it.push_list
            if name:
                self.note([replace(it.deadline, list_name=name)])
        record, written = _bytes(it.record), Written.DONE
        if it.result_key:
            standing = self._standing(it.result_key)
            if standing is not None:
                record, written = self.records[it.result_key], standing
            elif it.cancelled and it.result_key in self.cancelled and it.result_key not in self.records:
                written = Written.CANCELLED
            else:
                self._record(it.result_key, record)
            if written is Written.CANCELLED and not it.push_list:
                self.cancelled.pop(it.result_key, None)
        if it.request_id and not it.push_list and it.due_ms is None:
            self.under_way.pop(it.request_id, None)
            self._running.pop(it.request_id, None)
            self.contents.pop(it.request_id, None)
        if it.reply and record:
            self.replies[it.reply].append(record)
        if written is Written.CANCELLED and it.push_list:
            written = Written.DONE
        if written is not Written.DONE:
            return written
        if it.push_list:
            message = lease.message if it.push_message == SAME else _bytes(it.push_message)
            name = lease.list_name if it.push_list == SAME else it.push_list
            self.queues.push(name, message, front=it.push_front)
        if it.dead_reason:
            self.dead.append(DeadLetter(lease.list_name, it.dead_reason, lease.message))
        return Written.DONE

    def sweep(self, lease_ms: int) -> tuple[float | None, list[Swept]]:
        """Take over what nobody holds any longer, as ``sweep.lua`` does."""
        for request_id in [one for one in self.delayed if keys.result_key(one) in self.cancelled]:
            lease = self.leases[self.delayed[request_id]]
            self.leases[self.delayed[request_id]] = Lease(lease.list_name, lease.message, self.now)
        due = [name for name, lease in self.leases.items() if lease.expiry <= self.now]
        delayed = [name for name in due if name.startswith(keys.DELAYED_PREFIX)]
        taken = []
        for name in sorted(set(due) - set(delayed), key=lease_order)[-SWEEP_LIMIT:]:
            lease, mine = self.leases.pop(name), self._next_lease(name.partition("/")[2])
            self.leases[mine] = Lease(lease.list_name, lease.message, self.now + lease_ms)
            taken.append(Swept(mine, lease.list_name, lease.message))
        released = defaultdict[str, list[bytes]](list)
        for name in sorted(delayed, key=lambda name: (self.leases[name].expiry, lease_order(name))):
            lease = self.leases.pop(name)
            self.delayed = {one: held for one, held in self.delayed.items() if held != name}
            released[lease.list_name].append(lease.message)
        for list_name, messages in released.items():
            self.queues.release(list_name, messages)
        following = min((lease.expiry for lease in self.leases.values()), default=None)
        return float("inf") if following is None else max(0, following - self.now) / 1000, taken

    def late(self, lease_ms: int) -> tuple[float, list[Swept]]:
        """Take over what has waited for too long, as ``late.lua`` does."""
        latest, taken = self.now - int(LEFT_TO_WORKER_SECONDS * 1000), []
        for list_name, messages in self.queues.waiting().items():
            for message in messages:
                request_id = _id_of(message)
                entry = Deadline(request_id, list_name, 0.0).entry
                if request_id and self.deadlines.get(entry, float("inf")) <= latest:
                    lease = self._next_lease(self.queues.remove(list_name, message))
                    self.leases[lease] = Lease(list_name, message, self.now + lease_ms)
                    taken.append(Swept(lease, list_name, message, int(self.deadlines.pop(entry)) / 1000))
        self.deadlines = {name: at for name, at in self.deadlines.items() if at >= latest - FORGOTTEN_MS}
        following = min((at for at in self.deadlines.values() if at > latest), default=float("inf"))
        return max(1.0, following - latest) / 1000, taken

    def unread(self) -> list[tuple[str, bytes]]:
        """What others than our client have put on shared lists, as ``unread.lua`` finds it: here, each time anew."""
        return [
            (name, message)
            for name, messages in self.queues.waiting().items()
            for message in messages
            if not name.startswith(keys.LANE_PREFIX) and b'"muai":{"v"' not in message
        ]

    def note(self, deadlines: Sequence[Deadline]) -> list[float]:
        """Note deadlines, as ``deadlines.lua`` does."""
        return [self.deadlines.setdefault(one.entry, one.at * 1000) / 1000 for one in deadlines]

    def _next_lease(self, tenant: str) -> str:
        self._last += 1
        lease = f"{self._last}-{LEASES_OF}"
        return f"{lease}/{tenant}" if tenant else lease

    def _standing(self, key: str) -> Written | None:
        """What comes of a settlement because of the record that is there; ``None`` where it may be written."""
        record = self.records.get(key)
        return None if record is None else STANDS.get(orjson.loads(record)["status"])

    def _record(self, key: str, record: bytes) -> None:
        self.records[key] = record
        self.published.append((key, record))


def _id_of(message: bytes) -> str:
    """The id of a message's request, where it can be told."""
    try:
        return str(orjson.loads(message)["properties"]["correlation_id"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return ""


def _bytes(text: bytes | str) -> bytes:
    return text.encode() if isinstance(text, str) else text
