"""Claim, lease, outcome: the commands that move a request through the broker without losing it.

A claim moves messages from their queue to leases in one step. A lease is kept alive while the message waits or runs in
this process. An outcome ends the lease and writes what comes next in one step, or does nothing at all when the lease
is no longer ours. So a request gets exactly one terminal record wherever a process dies.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import redis

from shared import keys
from shared.broker import lua
from shared.settings import FleetSettings

logger = logging.getLogger(__name__)

SAME = "="
"""In an outcome: the list or the message as it was claimed."""

SWEEP_LIMIT = 100

RETRY_SECONDS = 1.0
"""When leases are renewed again after the broker did not answer."""


@dataclass(frozen=True, slots=True)
class Claimed:
    """One message that is now leased to this process."""

    lease: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Claim:
    """What a claim brought.

    ``now`` is the broker's clock in seconds, ``waiting`` what is left on the queue, ``cancelled`` how many
    cancellations the broker remembers.
    """

    now: float
    waiting: int
    cancelled: int
    messages: list[Claimed]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a lease ends. Build one with the functions of :mod:`workers.outcome`."""

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
    def give_back(cls, lease: str) -> Outcome:
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


@dataclass(frozen=True, slots=True)
class Swept:
    """An expired lease that this process took over. ``list_name`` is where its message came from."""

    lease: str
    list_name: str
    payload: bytes


class Delivery:
    """The scripts over one broker connection pool. Safe to use from several threads."""

    def __init__(self, client: redis.Redis, fleet: FleetSettings) -> None:
        self._fleet = fleet
        self._lease_ms = int(fleet.lease_seconds * 1000)
        self._settle_keys = [keys.LEASE_INDEX, keys.LEASE_MESSAGES, keys.DEAD_LETTERS]
        self._client = client
        self._claim = client.register_script(lua("workers", "claim"))
        self._settle = client.register_script(lua("workers", "settle"))
        self._renew = client.register_script(lua("workers", "renew"))
        self._sweep = client.register_script(lua("workers", "sweep"))

    def claim(self, queue: str, limit: int) -> Claim:
        """Lease up to ``limit`` messages of ``queue``, the most urgent and oldest first."""
        leases = [keys.LEASE_INDEX, keys.LEASE_MESSAGES, keys.LEASE_COUNTER, keys.CANCELLED]
        rows = self._claim(keys=leases + keys.lists_of(queue), args=[limit, self._lease_ms])
        messages = [Claimed(lease.decode(), payload) for lease, payload in zip(rows[3::2], rows[4::2], strict=True)]
        return Claim(rows[0] / 1000, rows[1], rows[2], messages)

    def settle(self, outcomes: Sequence[Outcome]) -> list[bool]:
        """Write outcomes; ``False`` where the lease was no longer ours and nothing was written."""
        if not outcomes:
            return []
        args: list[str | bytes | int] = [
            self._fleet.result_expires_seconds,
            self._fleet.dead_letter_capacity,
            keys.DELAYED_PREFIX,
        ]
        for outcome in outcomes:
            args.extend(outcome.arguments())
        written = self._settle(keys=self._settle_keys, args=args)
        return [flag == 1 for flag in written]

    def cancelled_among(self, request_ids: Sequence[str]) -> set[str]:
        """Which of these requests were cancelled."""
        if not request_ids:
            return set()
        scores = self._client.zmscore(keys.CANCELLED, [keys.result_key(request_id) for request_id in request_ids])
        return {request_id for request_id, score in zip(request_ids, scores, strict=True) if score is not None}

    def renew(self, leases: Iterable[tuple[str, float | None]]) -> list[str]:
        """Keep leases, each no longer than its time (seconds since the epoch); return those that are lost."""
        args: list[str | int] = [self._lease_ms]
        for lease, last in leases:
            args.append(lease)
            args.append(0 if last is None else int(last * 1000))
        if len(args) == 1:
            return []
        return [lease.decode() for lease in self._renew(keys=[keys.LEASE_INDEX], args=args)]

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


class LeaseKeeper:
    """Keeps the leases of this process alive from a thread of its own.

    A lease is kept past its deadline by ``grace`` seconds only: then whoever sweeps tells its caller.
    """

    def __init__(self, delivery: Delivery, fleet: FleetSettings) -> None:
        self._delivery = delivery
        self._interval = fleet.lease_seconds / 3
        self._held: dict[str, float | None] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def hold(self, lease: str, deadline: float | None = None) -> None:
        """Keep ``lease`` until it is released, but not past ``deadline`` (seconds since the epoch)."""
        with self._lock:
            self._held[lease] = deadline
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="lease-keeper", daemon=True)
                self._thread.start()

    def release(self, leases: Iterable[str]) -> None:
        """Stop keeping these leases."""
        with self._lock:
            for lease in leases:
                self._held.pop(lease, None)

    def close(self) -> None:
        """Stop the thread. Leases that are still held will expire."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=1)

    def _run(self) -> None:
        pause = self._interval
        while not self._stop.wait(pause):
            with self._lock:
                held = list(self._held.items())
            started = time.monotonic()
            try:
                lost = self._delivery.renew(held)
            except (redis.RedisError, OSError) as error:
                logger.warning("cannot keep %d leases: %s", len(held), error)
                pause = min(self._interval, RETRY_SECONDS)
                continue
            pause = self._interval
            took = time.monotonic() - started
            if took > self._interval:
                logger.warning("keeping %d leases took %.1f s: the broker is slow", len(held), took)
            with self._lock:
                really_lost = [lease for lease in lost if self._held.pop(lease, False) is not False]
            if really_lost:
                logger.warning("%d leases were lost to another worker", len(really_lost))
