"""The faults of workers in short: nothing is lost, nothing is answered twice, and every bar of the suite is met."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.suite import SCENARIOS, missed


@pytest.mark.timeout(170)
@pytest.mark.parametrize(
    "fault",
    ["killed-mid-request", "killed-asleep", "killed-at-random", "killed-around-the-hop", "request-that-kills"],
)
def test_workers_that_are_killed(fault: str, tmp_path: Path) -> None:
    """SIGKILL while a request runs, in a worker's sleep, at random, around a hop, and by a request itself."""
    assert missed(SCENARIOS[fault].in_short(tmp_path)) == ""


@pytest.mark.timeout(170)
@pytest.mark.parametrize("fault", ["same-ids", "ended-chords"])
def test_callers_are_told_all_the_same(fault: str, tmp_path: Path) -> None:
    """Who asks under an id that others use, and who holds the id of a chord's body only."""
    assert missed(SCENARIOS[fault].in_short(tmp_path)) == ""


@pytest.mark.timeout(170)
def test_one_bad_member_fails_alone(tmp_path: Path) -> None:
    """A batch with a member that crashes the engine, and one with a member that kills whoever runs it."""
    assert missed(SCENARIOS["bad-members"].in_short(tmp_path)) == ""
