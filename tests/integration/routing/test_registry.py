"""The registry on a real broker."""

from __future__ import annotations

import os
import signal

import pytest

from shared.errors import NoEngineAvailable
from tests.support.requests import ECHO
from tests.support.waiting import eventually


def test_a_silent_worker_disappears_within_ten_seconds(fleet) -> None:
    """A frozen worker is gone from the registry in at most 10 s, and a submit then says that none is there."""
    (worker,) = fleet.client.fleet()
    assert (worker.pid, worker.queues, worker.engines[0].name) == (fleet.processes[0].pid, ("fake",), "fake")
    os.kill(worker.pid, signal.SIGSTOP)
    ages: list[int] = []

    def gone() -> bool:
        found = fleet.client.fleet()
        ages.extend(silent.age_ms for silent in found)
        return not found

    eventually(gone, what="the worker's disappearance")

    assert max(ages) <= 10_000  # by the broker's clock, at which it was last there
    with pytest.raises(NoEngineAvailable):
        fleet.client.submit(ECHO)
    os.kill(worker.pid, signal.SIGCONT)
    eventually(lambda: fleet.client.fleet(), what="its return")


def test_a_worker_that_stops_leaves_at_once(fleet) -> None:
    """After SIGTERM nothing is routed to it any longer, and its process ends well."""
    fleet.processes[0].terminate()

    assert fleet.processes[0].wait(20) == 0
    assert fleet.client.fleet() == []
