"""What a Celery sender says of how long its task may wait and run, and what remote control says of all."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.fleet import FleetUnderTest
from tests.support.requests import ECHO, bare_app
from tests.support.waiting import eventually


def tell(fleet: FleetUnderTest, command: str, **arguments: Any) -> dict[str, str]:
    """Give the only worker a command of remote control; returns its answer."""
    app = bare_app(fleet.url)
    try:
        ((answer,),) = ([*reply.values()] for reply in app.control.broadcast(
            command, arguments={"task_name": "muai.infer", **arguments}, reply=True, timeout=20, limit=1
        ))  # fmt: skip
    finally:
        app.close()
    return answer


def test_a_bare_sender_s_limits_are_those_of_its_run(make_fleet) -> None:
    """``expires`` is for the start alone; time limits are for the run, which loading is no part of."""
    fleet = make_fleet(optimization={"fake": {"latency_ms": 1200, "load_ms": 1500}, "batcher": {"max_batch_size": 1}})
    fleet.start_worker()
    app = bare_app(fleet.url)
    send = {"kwargs": {"request": ECHO}, "queue": "fake"}

    patient = app.send_task("muai.infer", time_limit=2.5, **send)
    assert patient.get(timeout=30)["outputs"]["text"] == "olleh"
    expiring = app.send_task("muai.infer", expires=1, **send)
    assert expiring.get(timeout=30)["outputs"]["text"] == "olleh"
    for limit, name in (("time_limit", "TimeLimitExceeded"), ("soft_time_limit", "SoftTimeLimitExceeded")):
        with pytest.raises(Exception, match="time limit of 0.3 s") as failed:
            app.send_task("muai.infer", **{limit: 0.3}, **send).get(timeout=30)
        assert type(failed.value).__name__ == name
    app.close()


def test_remote_control_sets_time_limits_and_refuses_what_has_no_meaning(make_fleet) -> None:
    """Nothing is taken in silence."""
    fleet = make_fleet(optimization={"fake": {"latency_ms": 1000}})
    fleet.start_worker()

    assert tell(fleet, "time_limit", hard=0.2) == {"ok": "time limits set successfully"}
    outcome = fleet.client.submit(ECHO).outcome(20)
    assert type(outcome).__name__ == "TimeLimitExceeded"
    assert "error" in tell(fleet, "time_limit", hard="soon")
    assert "error" in tell(fleet, "time_limit", task_name="muai.control.watch", hard=1)
    assert tell(fleet, "time_limit") == {"ok": "time limits set successfully"}

    assert "requests_per_second" in tell(fleet, "rate_limit", rate_limit="1/m")["error"]
    assert eventually(lambda: fleet.client.submit(ECHO).result(20), what="an answer").text == "olleh"
