"""Leases of GPUs, in Redis.

A GPU is known by its uuid, which is the same in every container of a machine and on no other machine. So replicas that
all see the same GPUs take different ones, whatever their host names are. A lease ends when it is released or, where its
holder died, when it expires.
"""

from __future__ import annotations

import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import redis

from shared.broker import lua
from shared.gpus import GPU_KEYS, GpuBoard, GpuHolder, GpuMark, read_gpus

logger = logging.getLogger(__name__)

CLOCK_MARGIN = 0.02
"""The share of a lease by which its holder takes it to be shorter: clocks drift, and the broker's counts in ms."""

RETRY_SECONDS = 1.0
"""How soon a renewal is tried again that did not reach the broker."""


@dataclass(frozen=True, slots=True)
class Lease:
    """GPUs that are leased together. ``fence`` is this lease's own: no other lease ever has it."""

    fence: str
    gpus: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Grant:
    """A time, in monotonic seconds, during which a lease surely was ours: granted before it, expiring after it."""

    since: float
    until: float


class GpuLeases:
    """The scripts over leases and marks. Safe to use from several threads; raises what the client library raises."""

    def __init__(self, client: redis.Redis, lease_seconds: float, worker_id: str) -> None:
        self._client = client
        self.lease_seconds = lease_seconds
        self._holder = GpuHolder(worker=worker_id, host=platform.node(), pid=os.getpid()).model_dump_json()
        self._script = client.register_script(lua("workers.devices", "gpu_lease"))

    def acquire(self, candidates: Sequence[str], count: int) -> Lease | None:
        """Lease ``count`` of ``candidates`` at once, the first ones that are free; ``None`` where too few are."""
        fence = uuid.uuid4().hex
        gpus = self._run("acquire", fence, self._holder, self._lease_ms, count, *dict.fromkeys(candidates))
        return Lease(fence, tuple(gpus)) if gpus else None

    def renew(self, lease: Lease) -> list[str]:
        """Keep a lease, or take it up again where nobody has done so since it expired.

        Returns the GPUs that another lease has by now. Where there is one the whole lease has ended.
        """
        return self._run("renew", lease.fence, self._holder, self._lease_ms, *lease.gpus)

    def release(self, lease: Lease) -> None:
        """End a lease; what is no longer its own is left alone."""
        self._run("release", lease.fence, *lease.gpus)

    def mark(self, gpus: Sequence[str], reason: str, seconds: float) -> None:
        """Let nobody lease these GPUs for ``seconds``. A longer mark stays as long as it was."""
        self._run("mark", reason, int(seconds * 1000), *gpus)

    def marked(self) -> tuple[GpuMark, ...]:
        """The GPUs that are marked."""
        return self.board().marks

    def board(self) -> GpuBoard:
        """All leases and marks."""
        return read_gpus(self._client)

    @property
    def _lease_ms(self) -> int:
        return int(self.lease_seconds * 1000)

    def _run(self, *args: str | int) -> list[str]:
        return [name.decode() for name in self._script(keys=list(GPU_KEYS), args=args)]


class LeaseHolder:
    """Keeps one lease alive from a thread of its own until it is closed or lost.

    ``on_lost`` is called once, on that thread, with the uuids that another worker has by now: no GPU of the lease may
    be used any longer. Silence of the broker is no loss: nobody can lease them meanwhile, a worker without a broker
    gets no requests, and once the broker is back it says whether the lease is still there.
    """

    def __init__(
        self, leases: GpuLeases, lease: Lease, asked_at: float, on_lost: Callable[[Sequence[str]], None]
    ) -> None:
        self.lease = lease
        self.grant = self._granted(leases, asked_at)
        self._leases = leases
        self._on_lost = on_lost
        self._lost = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpu-lease", daemon=True)

    @property
    def valid(self) -> bool:
        """Whether the lease is surely ours now; ``False`` from its expiry until the broker has confirmed it again."""
        return not self._lost and not self._stop.is_set() and time.monotonic() < self.grant.until

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop renewing and release the lease. The broker's errors are logged: the lease then expires."""
        self._stop.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout=10)
        if self._lost:
            return
        try:
            self._leases.release(self.lease)
        except (redis.RedisError, OSError) as error:
            logger.warning("cannot release the GPUs; their lease expires by itself: %s", error)

    def _run(self) -> None:
        pause = interval = self._leases.lease_seconds / 3
        while not self._stop.wait(pause):
            asked_at = time.monotonic()
            try:
                lost = self._leases.renew(self.lease)
            except (redis.RedisError, OSError) as error:
                logger.warning("cannot renew the lease of %d GPUs: %s", len(self.lease.gpus), error)
                pause = min(interval, RETRY_SECONDS)
                continue
            pause = interval
            if lost:
                self._lost = True
                self._on_lost(lost)
                return
            self.grant = self._granted(self._leases, asked_at)

    @staticmethod
    def _granted(leases: GpuLeases, asked_at: float) -> Grant:
        return Grant(time.monotonic(), asked_at + leases.lease_seconds * (1 - CLOCK_MARGIN))
