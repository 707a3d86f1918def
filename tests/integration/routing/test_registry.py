"""The registry on a real broker."""

from __future__ import annotations

import os
import signal
import time

import pytest

from shared.errors import NoEngineAvailable
from shared.registry import WorkerInfo
from tests.support.requests import ECHO
from tests.support.shell import muai_says
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


def test_a_worker_that_loads_is_waited_for(make_fleet) -> None:
    """It is announced from its start on: requests are taken, its queue is left to it, and it answers them all."""
    fleet = make_fleet(
        fleet={"rescue_after_seconds": 0.5, "heartbeat_seconds": 0.2},
        optimization={"fake": {"load_ms": 6000}},
        monitoring={"server": {"preload_models": ["echo"]}},
    )
    fleet.start_worker("control")
    worker = fleet.start_worker(wait=False)

    def announced() -> WorkerInfo | None:
        return next((info for info in fleet.client.fleet() if info.loading), None)

    info = eventually(announced, what="the announcement of a worker that loads")
    assert (info.pid, info.queues, info.ready, info.loading) == (worker.pid, ("fake",), False, {"fake": "echo"})
    assert "(starting)" in muai_says(fleet, "status")
    handles = fleet.client.submit_many([ECHO] * 10)
    eventually(lambda: time.time() - info.started > 5, what="the time after which a queue without workers is rescued")

    assert [handle.result(60).text for handle in handles] == ["olleh"] * 10
    assert not any("no live worker" in fleet.log(process) for process in fleet.processes)
    eventually(lambda: all(one.ready and not one.loading for one in fleet.client.fleet()), what="its being ready")


def test_a_worker_that_loads_leaves_at_once_when_it_is_stopped(make_fleet) -> None:
    """SIGTERM in the middle of its loading."""
    fleet = make_fleet(optimization={"fake": {"load_ms": 60_000}}, monitoring={"server": {"preload_models": ["echo"]}})
    worker = fleet.start_worker(wait=False)
    eventually(lambda: fleet.client.fleet(), what="its announcement")

    worker.terminate()

    assert worker.wait(20) == 0
    assert fleet.client.fleet() == []


def test_a_worker_that_stops_leaves_at_once(fleet) -> None:
    """After SIGTERM nothing is routed to it any longer, and its process ends well."""
    fleet.processes[0].terminate()

    assert fleet.processes[0].wait(20) == 0
    assert fleet.client.fleet() == []
