"""Workers that have loaded different weights under one name."""

from __future__ import annotations

import os
import time

import pytest

from tests.support.fleet import FleetUnderTest
from tests.support.requests import ECHO
from tests.support.shell import muai_says
from tests.support.waiting import eventually


@pytest.fixture
def replaced(make_fleet, tmp_path):
    """Starts a worker with a model, replaces its files, and starts another: ``replaced(newest_only=True)``."""

    def start(**models: object) -> FleetUnderTest:
        folder = tmp_path / "model"
        folder.mkdir()
        fleet = make_fleet(
            fleet={"heartbeat_seconds": 0.3}, monitoring={"server": {"preload_models": ["echo"]}},
            models={**models, "catalog": {"echo": {"path": str(folder)}}},
        )  # fmt: skip
        for age, content in ((3600, b"old"), (0, b"new")):
            weights = folder / "model.safetensors"
            weights.write_bytes(content)
            os.utime(weights, (time.time() - age, time.time() - age))
            fleet.start_worker()
        return fleet

    return start


def test_a_difference_is_said_loudly(replaced) -> None:
    """By both workers in their logs, by muai status, and by the doctor."""
    fleet = replaced()
    (old, new) = fleet.processes

    for process in (old, new):
        eventually(
            lambda process=process: "different weights are served under the name 'echo'" in fleet.log(process),
            what="the warning",
        )
    said = muai_says(fleet, "status")
    assert f":{new.pid}; " in said
    assert "different weights are served under the name 'echo'" in said
    assert "weights echo: different ones are served" in muai_says(fleet, "doctor")


def test_by_choice_only_the_newest_serve(replaced) -> None:
    """The others say why they do not, and serve again when nobody else does."""
    fleet = replaced(newest_only=True)
    (old, new) = fleet.processes

    def outdated() -> bool:
        (info,) = (worker for worker in fleet.client.fleet() if worker.pid == old.pid)
        return "others serve the newer" in info.engines[0].failed.get("echo", "")

    eventually(outdated, what="the old worker's announcement")
    handles = fleet.client.submit_many([ECHO] * 30)
    assert {handle.result(20).metadata["worker"].split("-")[-2] for handle in handles} == {str(new.pid)}

    new.terminate()
    assert new.wait(20) == 0
    eventually(lambda: not outdated(), what="its serving again")
    assert fleet.client.submit(ECHO).result(20).metadata["worker"].split("-")[-2] == str(old.pid)
