"""Where the requests of one engine wait: which of them may run together, how large they are, and how long such take."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator

from shared.contract import InferenceRequest
from shared.limits import Limits, LimitsInForce
from workers.engines.base import Engine
from workers.path.batcher import Batch, Batcher, BatchLimits
from workers.path.run_times import RunTimes
from workers.requests.inflight import InFlight
from workers.requests.sizes import TokenEstimator

ALONE = "alone"
"""Key of a batch whose one member runs by itself."""


class WaitingRoom:
    """A batcher for requests. An engine that batches by itself is given each at once, by itself."""

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

    def add(self, item: InFlight, request: InferenceRequest, now: float) -> None:
        """Let a request wait. Times are in seconds since the epoch."""
        self._batcher.add(item, self._key(request), item.tokens, now)

    def tokens(self, request: InferenceRequest) -> int:
        """How many tokens it will take, as far as can be told."""
        return self._sizes.tokens(request)

    def most(self) -> int:
        """How many requests like those of late make a full batch."""
        limits = self._refreshed().limits
        if not self._sizes.mean:
            return limits.max_batch_size
        return min(limits.max_batch_size, max(1, int(limits.max_batch_tokens / self._sizes.mean)))

    def next_batch(self, now: float) -> Batch[InFlight] | None:
        """The batch that is due and has waited longest, if any. Ask when the engine is free to run it."""
        return self._refreshed().next_batch(now)

    def due_at(self, now: float) -> float | None:
        """When to ask again if nothing else happens; ``None`` when nothing waits."""
        return self._refreshed().due_at(now)

    def remove(self, items: Collection[InFlight]) -> None:
        """Take these out."""
        if items:
            self._batcher.remove(lambda item: item in items)

    def drain(self) -> list[InFlight]:
        """Take out everything, in the order of arrival."""
        return self._batcher.drain()

    # -- what is learnt from what ran -------------------------------------------------------------------------------

    def started(self, batch: Batch[InFlight]) -> None:
        """A batch was handed to the engine."""
        for item in batch.items:
            self._sizes.started(item.tokens)

    def ended(self, batch: Batch[InFlight], seconds: float) -> None:
        """The engine is through with a batch."""
        self._batcher.finished(batch.key, len(batch.items), seconds)

    def answered(
        self, item: InFlight, request: InferenceRequest, prompt_tokens: int, seconds: float, now: float
    ) -> None:
        """The engine says how many tokens the prompt had, and how many seconds the request ran until ``now``."""
        self._times.ran(self._like(request), seconds, item.started, now)
        self._sizes.learn(request, prompt_tokens)

    def usual_seconds(self, batch: Batch[InFlight]) -> float | None:
        """How long such a batch takes; ``None`` where none has run."""
        return self._batcher.expected_duration(batch.key)

    def least_seconds(self, request: InferenceRequest, now: float) -> float | None:
        """How long the quickest of such requests has run lately; ``None`` where too little is known of late."""
        return self._times.least(self._like(request), now)

    # -- rules ------------------------------------------------------------------------------------------------------

    def _key(self, request: InferenceRequest) -> Hashable:
        """Requests with the same key may share a batch."""
        return request.model, self._engine.compatibility(request), self._sizes.bucket(request)

    def _like(self, request: InferenceRequest) -> Hashable:
        """Requests that take about as long share this: those of like sizes, each within a factor of two."""
        inputs = request.inputs
        read, texts = inputs.characters().bit_length(), len(inputs.texts or ()).bit_length()
        written = request.params.max_tokens.bit_length() if request.generates else 0
        return request.model, self._engine.compatibility(request), read, texts, written

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
        return found if batcher.enabled and self._engine.slots is None else found.unbatched()
