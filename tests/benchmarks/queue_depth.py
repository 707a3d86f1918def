"""What a request costs the worker and the broker while many others wait on its queue."""

from __future__ import annotations

import time
import uuid
from itertools import count

import psutil
import redis

from shared import keys, wire
from shared.contract import InferenceRequest
from tests.benchmarks.harness import cpu_seconds, wait_for

CHUNK = 500
"""Messages that are pushed at once."""

MESSAGE_BYTES = 1300
"""What a waiting message may take in the broker at most: for the look at the memory before it is filled."""


class Backlog:
    """Messages on an engine's queue, encoded beforehand so that they cost little to push; their results are not read.

    Every message has an id of its own: a result that is there already would be another path through the outcome.
    """

    def __init__(self, client: redis.Redis, queue: str, model: str) -> None:
        self._client = client
        mark = str(uuid.uuid4())
        request = InferenceRequest.parse({"id": mark, "model": model, "inputs": {"prompt": "x"}})
        message = wire.encode_request(request, queue, sent=time.time())
        self._parts = message.split(mark.encode())
        self._list = keys.list_of(queue, request.priority.wire)
        self._lists = keys.lists_of(queue)
        self._ids = (b"%036d" % number for number in count())
        self.pushed = 0

    def waiting(self) -> int:
        """Messages that nobody has claimed."""
        with self._client.pipeline(transaction=False) as pipe:
            for name in self._lists:
                pipe.llen(name)
            return sum(pipe.execute())

    def fill(self, depth: int) -> None:
        """Push until ``depth`` messages wait."""
        while (missing := depth - self.waiting()) > 0:
            for _ in range(0, missing, CHUNK):
                self.push()

    def push(self) -> None:
        """Push one chunk."""
        self._client.lpush(self._list, *(next(self._ids).join(self._parts) for _ in range(CHUNK)))
        self.pushed += CHUNK

    def drop(self) -> None:
        """Take everything off the queue, and wait until what was claimed is answered and the memory is free."""
        self._client.delete(*self._lists)
        self.pushed = 0
        wait_for(lambda: not self._client.zcard(keys.LEASE_INDEX), "requests are still under way")
        wait_for(lambda: not self._client.info("memory")["lazyfree_pending_objects"], "the broker still frees memory")


def cost_us(backlog: Backlog, depth: int, requests: int, processes: list[psutil.Process]) -> float:
    """Processor time of ``processes`` per request, in microseconds, while ``depth`` wait and ``requests`` are claimed.

    What is claimed is pushed again, so the depth stays; pushing is part of the broker's cost at every depth.
    """
    backlog.fill(depth)
    claimed = backlog.pushed - backlog.waiting()
    spent = sum(map(cpu_seconds, processes))
    done = 0
    while done < requests:
        waiting = backlog.waiting()
        done = backlog.pushed - waiting - claimed
        if waiting < depth:
            backlog.push()
        else:
            time.sleep(0.005)
    spent = sum(map(cpu_seconds, processes)) - spent
    return spent / done * 1e6


def require_memory(waiting: int) -> None:
    """Raise :class:`MemoryError` where so many messages do not fit."""
    needed, there = waiting * MESSAGE_BYTES, psutil.virtual_memory().available
    if needed > there:
        raise MemoryError(
            f"{waiting:,} waiting messages need {needed / 2**30:.1f} GiB in the broker, and {there / 2**30:.1f} GiB "
            "are free; give a smaller number with --waiting"
        )
