"""What is learnt of how long requests run: of like ones, from several runs of late, and never from one slow one."""

from __future__ import annotations

import pytest

from workers.path.run_times import ENOUGH, KEPT, RECENT_SECONDS, RunTimes


def times(*runs: float, start: float = 0.0) -> tuple[RunTimes, float]:
    """Runs of one sort, one after the other; and when the last one ended."""
    found, now = RunTimes(), start
    for seconds in runs:
        found.ran("a", seconds, now, now + seconds)
        now += seconds
    return found, now


@pytest.mark.parametrize("runs", range(ENOUGH))
def test_nothing_is_said_before_there_is_evidence(runs: int):
    found, now = times(*[9.0] * runs)

    assert found.least("a", now) is None


def test_what_is_not_like_it_is_no_evidence():
    found, now = times(9.0, 9.0, 9.0)

    assert found.least("b", now) is None
    assert found.least("a", now) == 9.0


def test_slow_runs_change_nothing_beside_a_quick_one():
    found, now = times(30.0, 30.0, 0.1, 30.0)

    assert found.least("a", now) == 0.1


def test_runs_that_overlap_are_one_piece_of_evidence():
    """A batch, or what ran side by side during one slow moment; the quickest of them counts."""
    found = RunTimes()
    for seconds in (9.0, 8.0, 10.0, 12.0):
        found.ran("a", seconds, 0.0, seconds)
    assert found.least("a", 12.0) is None

    found.ran("a", 9.0, 13.0, 22.0)
    found.ran("a", 9.0, 22.0, 31.0)

    assert found.least("a", 31.0) == 8.0


def test_a_quick_run_is_forgotten_when_many_slower_ones_have_followed():
    found, now = times(0.1, *[2.0] * KEPT)

    assert found.least("a", now) == 2.0


def test_evidence_grows_old():
    """What takes long is remembered for a few times its length."""
    quick, now = times(1.0, 1.0, 1.0)
    assert quick.least("a", now + RECENT_SECONDS - 2) == 1.0
    assert quick.least("a", now + RECENT_SECONDS + 1) is None

    slow, now = times(60.0, 60.0, 60.0)

    assert slow.least("a", now) == 60.0
