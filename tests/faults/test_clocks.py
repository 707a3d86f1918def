"""Clocks that step, in short."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.suite import SCENARIOS, missed


@pytest.mark.timeout(170)
def test_a_clock_that_is_wrong_fails_no_request_and_runs_none_early(tmp_path: Path) -> None:
    """Those of a producer and of workers step by an hour, back, and by seconds, under load."""
    assert missed(SCENARIOS["clock-steps"].in_short(tmp_path)) == ""
