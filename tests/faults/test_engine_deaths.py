"""Engines that die, cannot load or are not installed, under load: every request is answered, by another engine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

from producer import InferenceResult
from shared.contract import EngineName
from tests.support.fleet import ROOT, FleetUnderTest
from tests.support.models import Models
from tests.support.tiny_models import greedy_reference
from tests.support.waiting import eventually

REQUESTS = 64
MAX_TOKENS = 150
PROMPTS = [f"question {number} " + "x" * (number % 30) for number in range(REQUESTS)]

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def reference(models: Models) -> list[list[int]]:
    """What transformers.generate says to each prompt alone."""
    found: list[list[int]] = models.answers(greedy_reference, models.path("llama"), PROMPTS, MAX_TOKENS)
    return found


def configuration(models: Models, first: str, **changes: Any) -> dict[str, Any]:
    """A fleet that prefers one engine and falls back to PyTorch."""
    return {
        "optimization": {
            "engine_preference": [first, "pytorch"],
            "deepspeed": {"tensor_parallel": 2, "dtype": "float32", "replace_with_kernel_inject": False},
            **changes,
        },
        "models": {
            "cache_dir": str(models.cache),
            "catalog": {"llama": {"path": str(models.path("llama")), "kinds": ["generate"]}},
        },
        "monitoring": {"server": {"preload_models": ["llama"]}},
    }


def ask(fleet: FleetUnderTest) -> list[Any]:
    """All requests at once."""
    return fleet.client.submit_many(
        [{"model": "llama", "inputs": {"prompt": p}, "params": {"max_tokens": MAX_TOKENS}} for p in PROMPTS],
        timeout=120,
    )


def out_of_service(fleet: FleetUnderTest, engine: str) -> dict[str, str]:
    """Why models of an engine cannot be asked."""
    found: dict[str, str] = {}
    for worker in fleet.client.fleet():
        for info in worker.engines:
            if info.name == engine:
                found.update(info.failed)
    return found


# Requirements: 1.6, 2.5, 15.1, 15.2
@pytest.mark.parametrize(
    ("engine", "process"),
    [
        pytest.param("vllm", "EngineCore", marks=pytest.mark.skipif(find_spec("vllm") is None, reason="no vLLM")),
        pytest.param(
            "deepspeed",
            "deepspeed.rank",
            marks=pytest.mark.skipif(find_spec("deepspeed") is None, reason="no DeepSpeed"),
        ),
    ],
)
def test_a_killed_engine_process(make_fleet, models, reference, engine: str, process: str) -> None:
    """SIGKILL of a process of the engine while 64 requests generate: all end right elsewhere; it comes back.

    SIGKILL of the worker: none of the engine's processes lives on.
    """
    fleet = make_fleet(configuration(models, engine))
    fleet.start_worker("pytorch", wait=False)
    worker = fleet.start_worker(engine, wait=False)
    for started in fleet.processes:
        fleet.wait_live(started, seconds=400)
    results = [handle.result(120) for handle in ask(fleet)]
    assert {result.engine_used for result in results} == {EngineName(engine)}
    assert [result.outputs["token_ids"] for result in results] == reference
    victim = next(
        child
        for child in reversed(psutil.Process(worker.pid).children(recursive=True))
        if process in child.name() or process in " ".join(child.cmdline())
    )

    handles = ask(fleet)
    eventually(lambda: any(w.in_flight for w in fleet.client.fleet()), what="requests in flight")
    os.kill(victim.pid, signal.SIGKILL)
    results = [handle.result(120) for handle in handles]

    assert [result.outputs["token_ids"] for result in results] == reference
    hopped = [result for result in results if result.metadata["hops"]]
    assert hopped
    assert {result.engine_used for result in hopped} == {EngineName.PYTORCH}
    for result in hopped:
        hop = result.metadata["hops"][0]
        assert hop["engine"] == engine
        assert "die" in hop["error"] or "kill" in hop["error"]
    eventually(lambda: not out_of_service(fleet, engine), 300, "the engine's return")
    again = fleet.client.submit({"model": "llama", "inputs": {"prompt": "back?"}}).result(60)
    assert again.engine_used == engine

    mine = psutil.Process(worker.pid).children(recursive=True)
    assert any(process in child.name() or process in " ".join(child.cmdline()) for child in mine)
    worker.kill()
    eventually(lambda: not [child for child in mine if runs(child)], what="the end of the killed worker's processes")


def runs(process: psutil.Process) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# Requirements: 3.5, 15.3
def test_a_conversion_that_fails(make_fleet, models, reference) -> None:
    """Where the model cannot be converted, the engine says so in the registry and its requests go on."""
    base = configuration(models, "onnx")
    base["models"]["cache_dir"] = "/dev/null/nowhere"
    fleet = make_fleet(base)
    fleet.start_worker("onnx,pytorch")

    results: list[InferenceResult] = [handle.result(120) for handle in ask(fleet)]

    assert [result.outputs["token_ids"] for result in results] == reference
    assert {result.engine_used for result in results} == {EngineName.PYTORCH}
    assert "nowhere" in out_of_service(fleet, "onnx")["llama"]


@pytest.fixture
def without_onnxruntime(tmp_path: Path) -> dict[str, str]:
    """An environment in which onnxruntime cannot be found."""
    (tmp_path / "sitecustomize.py").write_text(
        "from importlib.machinery import PathFinder\n"
        "find = PathFinder.find_spec\n"
        "def find_spec(name, path=None, target=None):\n"
        "    return None if name.partition('.')[0] == 'onnxruntime' else find(name, path, target)\n"
        "PathFinder.find_spec = staticmethod(find_spec)\n"
    )
    return {"PYTHONPATH": str(tmp_path)}


# Requirements: 3.4, 13.2
def test_a_library_that_is_gone(make_fleet, models, reference, without_onnxruntime) -> None:
    """The worker serves its other engine, and tells in the registry how to install what is missing."""
    fleet = make_fleet(configuration(models, "onnx"))
    fleet.start_worker("onnx,pytorch", environ=without_onnxruntime)

    results = [handle.result(120) for handle in ask(fleet)]

    assert [result.outputs["token_ids"] for result in results] == reference
    assert "pip install" in out_of_service(fleet, "onnx")["llama"]
    assert all("onnx" not in worker.queues for worker in fleet.client.fleet())


def test_a_worker_of_a_missing_engine_ends_with_one_line(make_fleet, models, without_onnxruntime) -> None:
    """A worker for that engine alone ends with what to install, not with a traceback."""
    fleet = make_fleet(configuration(models, "onnx"))

    done = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "workers", "worker", "-Q", "onnx"], cwd=ROOT, check=False, text=True,
        env={**fleet.environ, **without_onnxruntime}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60,
    )  # fmt: skip

    assert done.returncode == 1
    assert 'pip install "muai-fleet[onnx]"' in done.stdout
    assert "Traceback" not in done.stdout
