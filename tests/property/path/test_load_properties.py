"""Batches follow the load: random numbers of requests that come while the engine is busy, with an injected clock."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.path.batcher import PATIENCE_SHARE, Batcher, BatchLimits

pytestmark = pytest.mark.property
EXAMPLES = settings(max_examples=120, deadline=None, derandomize=True)

TAKES = st.floats(0.01, 2.0)


# Feature: advanced-optimization-monitoring, Property 7: batches grow and shrink with the load
@EXAMPLES
@given(
    most=st.integers(1, 16),
    timeout=st.floats(0.0, 1.0),
    loads=st.lists(st.tuples(st.integers(0, 24), TAKES), min_size=1, max_size=20),
)
def test_a_batch_takes_all_that_has_come_meanwhile(most: int, timeout: float, loads: list[tuple[int, float]]) -> None:
    """Up to its limit; at once where as many wait as ran last, else after a share of what a batch takes."""
    batcher: Batcher[int] = Batcher(BatchLimits(max_batch_size=most, batch_timeout=timeout))
    now, waiting, last = 0.0, 0, 1
    for count, took in loads:
        for number in range(count):
            batcher.add(number, "key", 1, now + took * number / count)
        waiting += count
        now += took
        due = batcher.due_at(now)
        if due is None:
            assert not waiting
            continue
        idle = max(0.0, due - now)
        usual = batcher.expected_duration("key") or 0.0

        batch = batcher.next_batch(now + idle)

        assert batch is not None
        assert len(batch.items) == min(waiting, most)
        assert idle <= (0.0 if waiting >= min(last, most) else min(timeout, PATIENCE_SHARE * usual))
        now += idle
        waiting -= len(batch.items)
        last = len(batch.items)
        batcher.finished("key", last, took)


# Feature: advanced-optimization-monitoring, Property 7: batches grow and shrink with the load
@EXAMPLES
@given(callers=st.integers(1, 12), fewer=st.integers(1, 12), took=TAKES, share=st.floats(0.0, 0.9))
def test_callers_that_come_back_together_stay_together(callers: int, fewer: int, took: float, share: float) -> None:
    """Answered together they run together again; when some stay away the others wait once, and then no longer."""
    batcher: Batcher[int] = Batcher(BatchLimits(max_batch_size=12, batch_timeout=60.0))
    batcher.finished("key", callers, took)
    gap = share * PATIENCE_SHARE * took
    now, sizes, idles = 0.0, [], []
    for back in (callers, callers, min(callers, fewer), min(callers, fewer)):
        batch = None
        for number in range(back):
            now += gap
            assert batch is None, "it ran before all had come"
            batcher.add(number, "key", 1, now)
            batch = batcher.next_batch(now)
        due = batcher.due_at(now)
        idles.append(0.0 if due is None else due - now)
        batch = batch or batcher.next_batch(now + idles[-1])
        assert batch is not None
        sizes.append(len(batch.items))
        now += idles[-1] + took
        batcher.finished("key", sizes[-1], took)

    assert sizes == [callers, callers, min(callers, fewer), min(callers, fewer)]
    assert (idles[0], idles[1], idles[3]) == (0.0, 0.0, 0.0)
    assert idles[2] <= PATIENCE_SHARE * took * 1.001
