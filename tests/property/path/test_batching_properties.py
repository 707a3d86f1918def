"""Properties 5, 6, 8 and 9 of the specification, over random arrivals, with an injected clock."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from workers.engines.common.decoding import pad_left, positions
from workers.engines.common.lengths import pad_right
from workers.path.batcher import Batch, Batcher, BatchLimits, FlushReason

pytestmark = pytest.mark.property

KEYS = st.sampled_from(["a", "b", "c"])
LIMITS = st.builds(
    BatchLimits,
    max_batch_size=st.integers(1, 8),
    max_batch_tokens=st.integers(1, 200),
    batch_timeout=st.floats(0.0, 1.0),
    adaptive=st.booleans(),
    min_batch_size=st.just(1),
)
ARRIVALS = st.lists(st.tuples(KEYS, st.integers(1, 50), st.floats(0.0, 0.2)), min_size=1, max_size=60)


def run_until_empty(batcher: Batcher[int], now: float) -> list[tuple[float, Batch[int]]]:
    """Take every batch at the moment the batcher asks for, with an engine that is always free."""
    taken = []
    while len(batcher):
        due = batcher.due_at(now)
        assert due is not None
        now = max(now, due)
        batch = batcher.next_batch(now)
        assert batch is not None, "what is due at a moment can be taken at that moment"
        taken.append((now, batch))
    return taken


# Feature: advanced-optimization-monitoring, Property 5: compatible requests run together
@given(count=st.integers(1, 32), gaps=st.lists(st.floats(0, 0.001), min_size=32, max_size=32))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_requests_of_one_key_within_the_timeout_share_a_batch(count: int, gaps: list[float]) -> None:
    """Compatible requests that arrive within the timeout, and fit, come out as one batch in order of arrival."""
    batcher: Batcher[int] = Batcher(BatchLimits(max_batch_size=32, batch_timeout=0.05, adaptive=False))
    now = 0.0
    for item in range(count):
        now += gaps[item]
        batcher.add(item, "key", 1, now)

    ((_, batch),) = run_until_empty(batcher, now)

    assert batch.items == list(range(count))


# Feature: advanced-optimization-monitoring, Property 5: compatible requests run together
@given(limits=LIMITS, arrivals=ARRIVALS)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_batches_are_pure_complete_and_within_their_limits(limits: BatchLimits, arrivals) -> None:
    """Every request comes out exactly once, in a batch of its own key, in order; no limit is exceeded."""
    batcher: Batcher[int] = Batcher(limits)
    now, keys, tokens, taken = 0.0, {}, {}, []
    for item, (key, size, gap) in enumerate(arrivals):
        now += gap
        batcher.add(item, key, size, now)
        keys[item], tokens[item] = key, size
        if item % 3 == 0:
            while (batch := batcher.next_batch(now)) is not None:
                taken.append(batch)
    taken += [batch for _, batch in run_until_empty(batcher, now)]

    out = [item for batch in taken for item in batch.items]
    assert sorted(out) == list(range(len(arrivals)))
    for batch in taken:
        assert {keys[item] for item in batch.items} == {batch.key}
        assert batch.items == sorted(batch.items)
        assert len(batch.items) <= limits.max_batch_size
        assert batch.tokens == sum(tokens[item] for item in batch.items)
        assert batch.tokens <= limits.max_batch_tokens or len(batch.items) == 1


# Feature: advanced-optimization-monitoring, Property 6: a batch runs when it is full or has waited long enough
@given(limits=LIMITS, arrivals=ARRIVALS)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_batch_runs_when_full_or_after_the_timeout_whichever_is_first(limits: BatchLimits, arrivals) -> None:
    """A full batch is due at once; no request waits longer than the timeout for an engine that is free."""
    batcher: Batcher[int] = Batcher(limits)
    now, arrived = 0.0, {}
    for item, (key, size, gap) in enumerate(arrivals):
        now += gap
        due = batcher.due_at(now)
        while due is not None and due <= now:
            batch = batcher.next_batch(now)
            assert batch is not None
            due = batcher.due_at(now)
        batcher.add(item, key, size, now)
        arrived[item] = now

    for at, batch in run_until_empty(batcher, now):
        if batch.reason is FlushReason.SIZE:
            assert len(batch.items) == limits.max_batch_size
        if batch.reason is FlushReason.TIMEOUT:
            assert at >= arrived[batch.items[0]] + limits.batch_timeout
        assert at <= max(now, arrived[batch.items[0]] + limits.batch_timeout) + 1e-9


# Feature: advanced-optimization-monitoring, Property 8: rows of a batch are padded to one length
@given(rows=st.lists(st.lists(st.integers(5, 99), min_size=1, max_size=20), min_size=1, max_size=12))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_sequences_are_padded_to_one_length_and_masked(rows: list[list[int]]) -> None:
    """Padded left or right, every row has the longest one's length, its mask covers just its own tokens."""
    longest = max(map(len, rows))

    for pad, side in ((pad_left, "left"), (pad_right, "right")):
        ids, mask = pad(rows, 0)

        assert ids.shape == mask.shape == (len(rows), longest)
        for row, tokens in enumerate(rows):
            assert ids[row][mask[row] == 1].tolist() == tokens
            assert mask[row].sum() == len(tokens)
            edge = mask[row][-len(tokens) :] if side == "left" else mask[row][: len(tokens)]
            assert edge.all()
    left = positions(pad_left(rows, 0)[1])
    assert [place[-1] for place in left] == [len(tokens) - 1 for tokens in rows]
    assert np.all(left >= 0)


# Feature: advanced-optimization-monitoring, Property 9: without batching each request runs alone, at once
@given(arrivals=ARRIVALS, limits=LIMITS)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_without_batching_every_request_runs_by_itself_at_once(arrivals, limits: BatchLimits) -> None:
    """Switched off, each request is due the moment it arrives, alone."""
    batcher: Batcher[int] = Batcher(limits.unbatched())
    now = 0.0
    for item, (key, size, gap) in enumerate(arrivals):
        now += gap
        batcher.add(item, key, size, now)

        batch = batcher.next_batch(now)

        assert batch is not None
        assert batch.items == [item]


def test_a_lone_request_never_waits_but_callers_that_come_back_together_are_waited_for() -> None:
    """After a batch of one the next runs at once; after one of four, a partial one waits a little."""
    batcher: Batcher[str] = Batcher(BatchLimits(max_batch_size=8, batch_timeout=10.0))
    batcher.finished("key", size=1, duration=0.8)
    batcher.add("lone", "key", 1, 100.0)
    lone = batcher.next_batch(100.0)
    batcher.finished("key", size=4, duration=0.8)
    batcher.add("first", "key", 1, 200.0)
    early = batcher.next_batch(200.0)
    batcher.add("second", "key", 1, 200.05)

    assert lone is not None
    assert lone.reason is FlushReason.IDLE
    assert early is None
    assert batcher.due_at(200.05) == pytest.approx(200.15)
    both = batcher.next_batch(200.16)
    assert both is not None
    assert both.items == ["first", "second"]


SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=30)


# Feature: advanced-optimization-monitoring, Property 6: a batch runs when it is full or has waited long enough
@given(limits=LIMITS, unbatched=st.booleans(), arrivals=st.lists(st.tuples(KEYS, SIZES), min_size=1, max_size=12))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_request_with_many_rows_runs_in_parts_of_full_batches(limits: BatchLimits, unbatched: bool, arrivals) -> None:
    """Each row runs once, in order; no batch exceeds its limits, unless it is of one row."""
    batcher: Batcher[int] = Batcher(limits.unbatched() if unbatched else limits)
    for item, (key, sizes) in enumerate(arrivals):
        batcher.add(item, key, sizes, 0.0)

    taken = run_until_empty(batcher, 0.0)

    ran: dict[int, list[int]] = {item: [] for item in range(len(arrivals))}
    for _, batch in taken:
        rows = [(item, row) for item, part in zip(batch.items, batch.rows, strict=True) for row in part]
        assert len(rows) <= limits.max_batch_size
        assert batch.tokens == sum(arrivals[item][1][row] for item, row in rows)
        assert batch.tokens <= limits.max_batch_tokens or len(rows) == 1
        assert len(set(batch.items)) == len(batch.items)
        assert len(batch.items) == 1 or not unbatched
        for item, row in rows:
            assert batch.key == arrivals[item][0]
            ran[item].append(row)
    assert all(ran[item] == list(range(len(sizes))) for item, (_, sizes) in enumerate(arrivals))
    assert batcher.begun == 0


# Feature: advanced-optimization-monitoring, Property 5: compatible requests run together
@given(
    most=st.integers(2, 16),
    large=st.lists(st.integers(17, 90), min_size=1, max_size=3),
    small=st.integers(1, 8),
    before=st.integers(0, 6),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_small_request_waits_for_no_large_one(most: int, large: list[int], small: int, before: int) -> None:
    """Whatever has begun before it, one that fits beside them is in the next batch."""
    batcher: Batcher[str] = Batcher(BatchLimits(max_batch_size=most, batch_timeout=0.0))
    for number, rows in enumerate(large):
        batcher.add(f"large {number}", "key", [1] * rows, 0.0)
    for _ in range(before):
        batcher.next_batch(0.0)
    rows = min(small, most // 2)
    batcher.add("small", "key", [1] * rows, 0.0)

    batch = batcher.next_batch(0.0)

    assert batch is not None
    assert batch.rows[batch.items.index("small")] == range(rows)
    assert sum(map(len, batch.rows)) == most or not len(batcher)


class BatcherMachine(RuleBasedStateMachine):
    """The batcher against a plain list: whatever is added leaves once, by batch, by removal or by draining."""

    def __init__(self) -> None:
        super().__init__()
        self.batcher: Batcher[int] = Batcher(BatchLimits(max_batch_size=4, max_batch_tokens=30, batch_timeout=0.5))
        self.inside: list[int] = []
        self.now = 0.0
        self.next = 0

    @rule(key=KEYS, tokens=st.integers(1, 20), gap=st.floats(0, 0.3))
    def add(self, key: str, tokens: int, gap: float) -> None:
        self.now += gap
        self.batcher.add(self.next, key, tokens, self.now)
        self.inside.append(self.next)
        self.next += 1

    @rule(gap=st.floats(0, 0.6), size=st.integers(1, 4), duration=st.floats(0, 1))
    def take(self, gap: float, size: int, duration: float) -> None:
        self.now += gap
        batch = self.batcher.next_batch(self.now)
        if batch is not None:
            for item in batch.items:
                self.inside.remove(item)
            self.batcher.finished(batch.key, size, duration)

    @rule(divisor=st.integers(2, 5))
    def remove(self, divisor: int) -> None:
        removed = self.batcher.remove(lambda item: item % divisor == 0)
        assert sorted(removed) == [item for item in self.inside if item % divisor == 0]
        self.inside = [item for item in self.inside if item % divisor]

    @precondition(lambda self: len(self.inside) > 10)
    @rule()
    def drain(self) -> None:
        assert self.batcher.drain() == self.inside
        self.inside = []

    @invariant()
    def counts(self) -> None:
        assert len(self.batcher) == len(self.inside)
        assert sorted(self.batcher) == self.inside
        assert (self.batcher.due_at(self.now) is None) == (not self.inside)


TestBatcherMachine = BatcherMachine.TestCase
TestBatcherMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
