"""Queues that are added to a worker, or taken from it, while it runs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from shared.contract import EngineName
from shared.registry import WorkerInfo
from tests.support.fleet import ROOT, FleetUnderTest
from tests.support.requests import ECHO, bare_app
from tests.support.waiting import eventually


def tell(fleet: FleetUnderTest, command: str, queue: str) -> dict[str, str]:
    """Give every worker a command of remote control; returns the answer of the only one."""
    app = bare_app(fleet.url)
    try:
        ((answer,),) = ([*reply.values()] for reply in app.control.broadcast(
            command, arguments={"queue": queue}, reply=True, timeout=20, limit=1
        ))  # fmt: skip
    finally:
        app.close()
    return answer


def only_worker(fleet: FleetUnderTest) -> WorkerInfo:
    (worker,) = fleet.client.fleet()
    return worker


def test_an_engine_is_loaded_when_its_queue_is_added(make_fleet) -> None:
    """It serves what waited there, its preloaded models are loaded first, and the fleet knows of it."""
    fleet = make_fleet(monitoring={"server": {"preload_models": ["echo"]}})
    worker = fleet.start_worker("control")
    app = bare_app(fleet.url)
    answer = app.send_task("muai.infer", kwargs={"request": ECHO}, queue="fake")

    assert tell(fleet, "add_consumer", "fake") == {"ok": "add consumer fake"}

    assert answer.get(timeout=30)["outputs"]["text"] == "olleh"
    info = eventually(lambda: "fake" in only_worker(fleet).queues and only_worker(fleet), what="the announcement")
    assert info.engines[0].models["echo"].loaded
    assert "the fake engine is taken on" in fleet.log(worker)
    assert tell(fleet, "add_consumer", "fake") == {"ok": "add consumer fake"}
    assert fleet.client.submit(ECHO).result(20).text == "olleh"
    app.close()


@pytest.mark.parametrize(
    ("queue", "reason"),
    [
        ("onnx", "the onnx engine is switched off (optimization.onnx.enabled)"),
        ("vllm", "the vllm engine cannot run here"),
        ("pytroch", "there is no queue 'pytroch'; did you mean 'pytorch'?"),
    ],
)
def test_a_queue_that_cannot_be_served_is_refused_with_the_reason(make_fleet, queue: str, reason: str) -> None:
    """And nothing is taken from it."""
    fleet = make_fleet(optimization={"onnx": {"enabled": False}})
    fleet.start_worker("fake", environ={"PYTHONPATH": str(without_vllm(fleet))})

    assert reason in tell(fleet, "add_consumer", queue)["error"]

    assert only_worker(fleet).queues == ("fake",)


def without_vllm(fleet: FleetUnderTest) -> object:
    """A folder on whose path vLLM is not found, wherever it is installed."""
    (fleet.folder / "sitecustomize.py").write_text(
        "import importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'vllm' else find(name, *rest)\n"
    )
    return fleet.folder


def test_a_queue_that_is_taken_away_is_no_longer_served(make_fleet) -> None:
    """Requests go to other engines, what waits there is for other workers, and the queue can be added again."""
    fleet = make_fleet()
    fleet.start_worker("fake,control")

    assert tell(fleet, "cancel_consumer", "fake") == {"ok": "no longer consuming from fake"}

    eventually(lambda: only_worker(fleet).queues == ("control",), what="the announcement")
    assert only_worker(fleet).engines == ()
    assert "does not consume" in tell(fleet, "cancel_consumer", "fake")["error"]
    handle = fleet.client.submit(ECHO, timeout=60)
    assert tell(fleet, "add_consumer", "fake") == {"ok": "add consumer fake"}
    assert handle.result(20).engine_used is EngineName.FAKE


@pytest.mark.parametrize("option", ["-Q", "-X"])
def test_a_queue_of_the_command_line_that_does_not_exist_is_one_line(make_fleet, option: str) -> None:
    """It names the nearest, and the worker does not start."""
    fleet = make_fleet()

    command = [sys.executable, "-W", "ignore", "-m", "celery", "-A", "workers", "worker", option, "fake,pytroch"]
    ended = subprocess.run(command, cwd=ROOT, env=fleet.environ, capture_output=True, text=True, timeout=120)

    assert ended.returncode == 64
    (line,) = ended.stderr.splitlines()
    assert line.startswith("Error: there is no queue 'pytroch'; did you mean 'pytorch'? (there are: control, ")
