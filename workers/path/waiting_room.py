"""Where the requests of one engine wait: what of them may run together, how large they are, and how long such take."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator
from dataclasses import replace

from shared.contract import InferenceRequest
from shared.limits import Limits, LimitsInForce
from workers.engines.base import Engine
from workers.path.batcher import Batch, Batcher, BatchLimits
from workers.path.run_times import RunTimes
from workers.requests.inflight import InFlight
from workers.requests.rows import Part, Rows
from workers.requests.sizes import Size, TokenEstimator

ALONE = "alone"
"""Key of a batch whose one member runs by itself."""


class WaitingRoom:
    """A batcher for requests. An engine that batches by itself is given each row at once, by itself."""

    def __init__(self, engine: Engine, limits: LimitsInForce) -> None:
        self._engine = engine
        self._in_force = limits
        self._limits = limits.now
        self._batcher: Batcher[InFlight] = Batcher(self._batch_limits(self._limits))
        self._sizes = TokenEstimator(self._limits.batcher.length_buckets)
        self._times = RunTimes()

    def __len__(self) -> int:
        return len(self._batcher)

    def __iter__(self) -> Iterator[InFlight]:
        return iter(self._batcher)

    @property
    def begun(self) -> int:
        """How many of those that wait have run in part."""
        return self._batcher.begun

    @property
    def alone(self) -> bool:
        """Whether one that runs by itself waits, or what has not run of it."""
        return self._batcher.waits(ALONE)

    def add(self, item: InFlight, request: InferenceRequest, now: float, *, alone: bool = False) -> None:
        """Let a request wait; ``alone``: for a batch of its own, at once. Times are in seconds since the epoch."""
        size, together = self._sizes.measured(request), self._engine.compatibility(request)
        item.rows = rows = Rows(request, size.tokens, size.read, _like(request.model, together, size))
        # Requests with the same key may share a batch.
        key = ALONE if alone else (request.model, together, size.bucket)
        self._batcher.add(item, key, rows.tokens, now, begun=alone)

    def most(self) -> int:
        """How many requests like those of late make a full batch."""
        limits = self._refreshed().limits
        if limits.alone:
            return 1
        rows, tokens = self._sizes.rows.value or 1.0, self._sizes.tokens.value or 1.0
        return max(1, int(min(limits.max_batch_size / rows, limits.max_batch_tokens / tokens)))

    def room(self) -> int:
        """How many more requests the next batch may hold; beside those that have run in part, in half of it."""
        most, begun = self.most(), self.begun
        return (max(1, most // 2) if begun else most) - (len(self) - begun)

    def next_batch(self, now: float) -> Batch[Part] | None:
        """The batch that is due and has waited longest, if any. Ask when the engine is free to run it."""
        batch = self._refreshed().next_batch(now)
        if batch is None:
            return None
        parts = [part_of(item, rows.start, rows.stop) for item, rows in zip(batch.items, batch.rows, strict=True)]
        return Batch(batch.key, parts, batch.tokens, batch.reason, batch.waited, batch.rows)

    def due_at(self, now: float) -> float | None:
        """When to ask again if nothing else happens; ``None`` when nothing waits."""
        return self._refreshed().due_at(now)

    def remove(self, items: Collection[InFlight]) -> None:
        """Take these out."""
        if items:
            self._batcher.remove(lambda item: item in items)

    def drain(self) -> list[InFlight]:
        """Take out everything that has not run in part, in the order of arrival."""
        return self._batcher.drain()

    # -- what is learnt from what ran -------------------------------------------------------------------------------

    def started(self, batch: Batch[Part]) -> None:
        """A batch was handed to the engine."""
        for part in batch.items:
            if part.first == 0:
                self._sizes.started(part.rows.tokens)

    def ended(self, batch: Batch[Part], seconds: float) -> None:
        """The engine is through with a batch."""
        self._batcher.finished(batch.key, sum(map(len, batch.items)), seconds)

    def answered(self, rows: Rows, prompt_tokens: int, started: float, now: float) -> None:
        """The engine says how many tokens the prompt of a request had that ran between these times, at least in part.

        How long it ran, without loading, is known by its rows.
        """
        self._times.ran(rows.like, rows.ran_ms / 1000, started, now)
        self._sizes.learn(rows.request.model, rows.read, prompt_tokens)

    def usual_seconds(self, batch: Batch[Part]) -> float | None:
        """How long such a batch takes; ``None`` where none has run."""
        return self._batcher.expected_duration(batch.key)

    def least_seconds(self, request: InferenceRequest, now: float) -> float | None:
        """How long the quickest of such requests has run lately; ``None`` where too little is known of late."""
        like = _like(request.model, self._engine.compatibility(request), self._sizes.measured(request))
        return self._times.least(like, now)

    # -- rules ------------------------------------------------------------------------------------------------------

    def _refreshed(self) -> Batcher[InFlight]:
        limits = self._in_force.now
        if limits is not self._limits:
            self._limits = limits
            self._batcher.limits = self._batch_limits(limits)
        return self._batcher

    def _batch_limits(self, limits: Limits) -> BatchLimits:
        batcher = limits.batcher
        found = BatchLimits(
            max_batch_size=batcher.max_batch_size,
            max_batch_tokens=batcher.max_batch_tokens,
            batch_timeout=batcher.batch_timeout_ms / 1000,
            adaptive=batcher.adaptive_batching,
            min_batch_size=batcher.min_batch_size,
        )
        if self._engine.slots is not None:
            return replace(found.unbatched(), max_batch_size=1)
        return found if batcher.enabled else found.unbatched()


def _like(model: str, together: Hashable, size: Size) -> Hashable:
    """Requests that take about as long share this: those of like sizes, each within a factor of two."""
    return model, together, size.read.bit_length(), len(size.tokens).bit_length(), size.written.bit_length()


def part_of(item: InFlight, first: int, last: int) -> Part:
    """The rows of a request that waits from ``first`` to before ``last``."""
    if item.rows is None:
        raise ValueError("a request has rows once it waits")
    return Part(item, item.rows, first, last)
