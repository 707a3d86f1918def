"""Workers that stop, stall or are gone, and a while in which all of it happens, in short."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.suite import SCENARIOS, missed


@pytest.mark.timeout(170)
def test_a_rolling_restart_fails_nothing(tmp_path: Path) -> None:
    """Each worker is sent SIGTERM under load: it ends within its grace, and everything is answered."""
    assert missed(SCENARIOS["rolling-restart"].in_short(tmp_path)) == ""


@pytest.mark.timeout(170)
def test_an_engine_without_workers(tmp_path: Path) -> None:
    """All workers of an engine are killed: its requests go to the next one, or fail and say why."""
    assert missed(SCENARIOS["engine-gone"].in_short(tmp_path)) == ""


@pytest.mark.timeout(170)
def test_a_stalled_worker_keeps_its_requests(tmp_path: Path) -> None:
    """The interpreter's lock is held for longer than a lease; a request runs far longer: each is run once."""
    assert missed(SCENARIOS["held-interpreter"].in_short(tmp_path)) == ""


@pytest.mark.timeout(170)
def test_a_while_of_everything(tmp_path: Path) -> None:
    """A fault every few seconds, of workers, connections and the broker: nothing is lost, and no key stays behind."""
    assert missed(SCENARIOS["soak"].in_short(tmp_path)) == ""
