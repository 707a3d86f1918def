"""The registry on a real broker."""

from __future__ import annotations

import os
import signal
import time

import pytest

from shared.errors import NoEngineAvailable
from tests.conftest import eventually
from tests.integration.client.test_submitting import ECHO


def test_a_silent_worker_disappears_within_ten_seconds(fleet) -> None:
    """A frozen worker is gone from the registry in at most 10 s, and a submit then says that none is there."""
    (worker,) = fleet.client.fleet()
    assert (worker.pid, worker.queues, worker.engines[0].name) == (fleet.processes[0].pid, ("fake",), "fake")
    os.kill(worker.pid, signal.SIGSTOP)
    started = time.monotonic()

    eventually(lambda: not fleet.client.fleet(), 12, "the worker's disappearance")

    assert time.monotonic() - started <= 10
    with pytest.raises(NoEngineAvailable):
        fleet.client.submit(ECHO)
    os.kill(worker.pid, signal.SIGCONT)
    eventually(lambda: fleet.client.fleet(), 10, "its return")


def test_a_worker_that_stops_leaves_at_once(fleet) -> None:
    """After SIGTERM nothing is routed to it any longer, and its process ends well."""
    fleet.processes[0].terminate()

    assert fleet.processes[0].wait(20) == 0
    assert fleet.client.fleet() == []
