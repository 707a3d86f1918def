"""Which GPUs are leased and which are marked: what workers and operators read of it. Workers write it."""

from __future__ import annotations

from typing import Any

import redis

from shared import keys
from shared.broker import lua
from shared.contract import Value

GPU_KEYS = (keys.GPU_LEASES, keys.GPU_HOLDERS, keys.GPU_MARKED, keys.GPU_MARKS)
"""The keys of the scripts over GPUs, in their order."""


class GpuHolder(Value):
    """Who holds a lease: the worker's id, and its host name and process id as it sees them itself."""

    worker: str
    host: str
    pid: int


class GpuLease(Value):
    """A GPU that is leased, and the seconds after which the lease ends unless it is renewed."""

    uuid: str
    holder: GpuHolder
    seconds_left: float


class GpuMark(Value):
    """A GPU that nobody may lease, why, and for how many seconds."""

    uuid: str
    reason: str
    seconds_left: float


class GpuBoard(Value):
    """All leases and marks of the fleet at one moment."""

    leases: tuple[GpuLease, ...] = ()
    marks: tuple[GpuMark, ...] = ()

    def lease_of(self, uuid: str) -> GpuLease | None:
        """The lease of a GPU; ``None`` where it is free."""
        return next((lease for lease in self.leases if lease.uuid == uuid), None)

    def mark_of(self, uuid: str) -> GpuMark | None:
        """The mark of a GPU; ``None`` where there is none."""
        return next((mark for mark in self.marks if mark.uuid == uuid), None)


def read_gpus(client: redis.Redis) -> GpuBoard:
    """What the broker says of leases and marks now. Raises what the client library raises."""
    rows: Any = client.eval(lua("shared", "gpus"), len(GPU_KEYS), *GPU_KEYS)
    leases, marks = (list(zip(part[::3], part[1::3], part[2::3], strict=True)) for part in rows)
    return GpuBoard(
        leases=tuple(
            GpuLease(uuid=uuid.decode(), holder=GpuHolder.model_validate_json(holder), seconds_left=left / 1000)
            for uuid, left, holder in leases
        ),
        marks=tuple(
            GpuMark(uuid=uuid.decode(), reason=reason.decode(errors="replace"), seconds_left=left / 1000)
            for uuid, left, reason in marks
        ),
    )
