"""Selection, outages and their end, seen from the client: on the fake engine and its kin, with real workers."""

from __future__ import annotations

import pytest

from shared.contract import EngineName
from shared.errors import DeadlineExceeded, EngineError, NoEngineAvailable
from tests.support.fleet import FleetUnderTest
from tests.support.waiting import eventually

REQUEST = {"model": "echo", "inputs": {"prompt": "abc"}}


def failures(fleet: FleetUnderTest) -> dict[str, str]:
    """What the live workers' engines say of their models."""
    return {
        name: why for worker in fleet.client.fleet() for info in worker.engines for name, why in info.failed.items()
    }


def test_an_engine_that_keeps_failing_is_rested_and_comes_back(make_fleet):
    """After five failures in a row requests are refused at once with the reason; after the rest they are served."""
    fleet = make_fleet(optimization={"breaker": {"rest_seconds": 3.0}})
    fleet.start_worker("fake")
    for _ in range(5):
        with pytest.raises(EngineError, match="told to fail"):
            fleet.client.submit({**REQUEST, "inputs": {"prompt": "!fail"}}).result(10)
    eventually(lambda: "echo" in failures(fleet), what="the rest")

    with pytest.raises((EngineError, NoEngineAvailable), match="told to fail"):
        fleet.client.submit(REQUEST).result(10)

    result = fleet.client.submit(REQUEST, timeout=20).result(20)
    assert result.text == "cba"
    assert failures(fleet) == {}


def test_a_success_in_between_keeps_the_engine_in_service(make_fleet):
    """Failures count in a row: one bad caller does not take the engine from the others."""
    fleet = make_fleet()
    fleet.start_worker("fake")

    for _ in range(8):
        with pytest.raises(EngineError):
            fleet.client.submit({**REQUEST, "inputs": {"prompt": "!fail"}}).result(10)
        assert fleet.client.submit(REQUEST).result(10).text == "cba"


def test_a_passing_error_is_tried_again_on_the_same_engine(make_fleet):
    """An engine that is busy once is asked again after a pause; the request has no hop."""
    fleet = make_fleet()
    fleet.start_worker("fake")

    result = fleet.client.submit({**REQUEST, "inputs": {"prompt": "!busy once"}}).result(10)

    assert result.metadata["hops"] == []


def test_an_engine_that_stays_busy_fails_the_request(make_fleet):
    """The retries are bounded."""
    fleet = make_fleet()
    fleet.start_worker("fake")

    with pytest.raises(EngineError, match="busy"):
        fleet.client.submit({**REQUEST, "inputs": {"prompt": "!busy always"}}).result(10)


def test_all_down_ends_at_the_deadline(make_fleet):
    """With no worker at all, a request with a deadline is taken and ends when it passes, with a clear error."""
    fleet = make_fleet()

    with pytest.raises(DeadlineExceeded, match="no worker is alive"):
        fleet.client.submit(REQUEST, timeout=1.5).result(60)


def test_served_when_an_engine_returns_in_time(make_fleet):
    """With no worker at all, a request with a deadline waits for one."""
    fleet = make_fleet()
    handle = fleet.client.submit(REQUEST, timeout=60)
    fleet.start_worker("fake")

    assert handle.result(60).text == "cba"


def test_without_a_deadline_it_is_refused_at_once(make_fleet):
    """Nobody waits for ever: the error names the command that starts a worker."""
    with pytest.raises(NoEngineAvailable, match="celery -A workers worker"):
        make_fleet().client.submit(REQUEST)


def test_what_waits_on_a_queue_without_workers_moves_on(make_fleet):
    """A queue whose last worker is gone is emptied onto the next able engine's; the history says why."""
    fleet = make_fleet(
        fleet={"rescue_after_seconds": 1.0, "heartbeat_seconds": 0.3},
        optimization={"engine_preference": ["onnx", "fake"]},
        models={"catalog": {"echo": {"engines": ["onnx", "fake"]}}},
    )
    client = fleet.client
    handles = client.submit_many([{**REQUEST, "inputs": {"prompt": f"n{i}"}} for i in range(300)], timeout=60)
    fleet.start_worker("fake")

    results = [handle.result(60) for handle in handles]

    assert [result.text for result in results] == [f"n{i}"[::-1] for i in range(300)]
    assert {result.engine_used for result in results} == {EngineName.FAKE}
    assert "no live worker" in results[0].metadata["hops"][0]["error"]
