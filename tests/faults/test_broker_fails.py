"""The faults of the broker and of the connections to it, in short."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.suite import SCENARIOS, missed


@pytest.mark.timeout(170)
@pytest.mark.parametrize(
    "fault", ["broker-killed", "half-open", "broker-frozen", "broker-full", "failover", "broker-flushed"]
)
def test_a_broker_that_fails(fault: str, tmp_path: Path) -> None:
    """Killed, silent, frozen, full, set back, emptied: callers are told, workers come back, each id has one answer."""
    assert missed(SCENARIOS[fault].in_short(tmp_path)) == ""
