"""Engines that hang in what they were given: their workers give it back, and end for their supervisors."""

from __future__ import annotations

from pathlib import Path

import pytest
import redis

from shared import keys
from shared.errors import DeadLettered
from tests.faults.suite import SCENARIOS, missed
from tests.support.requests import ECHO
from tests.support.waiting import eventually

HANGS = {"fake": {"latency_ms": 600_000}, "watchdog": {"idle_seconds": 2.0}}


def test_a_worker_whose_engine_hangs_gives_its_requests_back_and_ends(make_fleet, redis_client: redis.Redis) -> None:
    """With status 1 and the reason in its log, soon; each hang is a delivery, and the last one ends the request."""
    fleet = make_fleet(fleet={"lease_seconds": 600, "max_deliveries": 2}, optimization=HANGS)
    first = fleet.start_worker()
    handle = fleet.client.submit(ECHO)

    assert first.wait(60) == 1

    log = fleet.log(first)
    assert "the fake engine hangs in a call: no progress for" in log
    assert "workers/engines/fake.py" in log  # where it stands
    assert "the worker is gone: the 1 leases it held are given back" in eventually(
        lambda: "is gone" in fleet.log(first) and fleet.log(first), what="the end of the leases"
    )
    assert fleet.client.fleet() == []
    second = fleet.start_worker()
    assert second.wait(60) == 1
    fleet.start_worker("control")
    with pytest.raises(DeadLettered, match="delivered 2 times"):
        handle.result(30)
    assert redis_client.hlen(keys.LEASE_MESSAGES) == 0


def test_a_worker_whose_load_hangs_ends(make_fleet) -> None:
    """It counts as loading only for as long as it makes progress."""
    fleet = make_fleet(
        optimization={**HANGS, "fake": {"load_ms": 600_000}}, monitoring={"server": {"preload_models": ["echo"]}}
    )
    worker = fleet.start_worker(wait=False)

    assert worker.wait(60) == 1

    assert "the fake engine hangs with loading 'echo': no progress for" in fleet.log(worker)
    assert fleet.client.fleet() == []


def test_hanging_requests_among_others(tmp_path: Path) -> None:
    """Every worker hangs in them: they are given up, and the others are answered."""
    assert missed(SCENARIOS["hanging-engine"].in_short(tmp_path)) == ""
