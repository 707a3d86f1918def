"""A real worker with stand-in GPUs: it announces what it leased, and ends when its GPU breaks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import redis

from producer.doctor.broker import check_gpu_leases
from shared.findings import Grade
from shared.gpus import read_gpus
from tests.integration.devices.nvml.standin import StandIn
from tests.support.fleet import ROOT, FleetUnderTest
from tests.support.waiting import eventually

pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")

BUILT_FOR_CUDA = """
from workers.devices.devices import Devices
Devices.__init__.__kwdefaults__["uses_cuda"] = lambda engine: True
"""


@pytest.fixture
def gpu_build(tmp_path: Path) -> dict[str, str]:
    """Variables under which a worker takes the libraries of its engines to be built for CUDA."""
    folder = tmp_path / "gpu-build"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BUILT_FOR_CUDA)
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])}


@pytest.mark.timeout(170)
def test_a_worker_leases_a_gpu_and_leaves_a_broken_one(
    machine, make_fleet, gpu_build, redis_client: redis.Redis
) -> None:
    """The registry names the GPU; a failure ends the worker with status 1, and its successor takes the other GPU."""
    standin: StandIn = machine(2)
    fleet: FleetUnderTest = make_fleet(optimization={"devices": {"check_seconds": 0.1, "wait_seconds": 5}})
    worker = fleet.start_worker("onnx", environ={**standin.environ, **gpu_build})
    (announced,) = fleet.client.fleet()
    assert announced.gpus == (standin.uuids[0],)
    assert f"CUDA_VISIBLE_DEVICES={standin.uuids[0]}" in fleet.log(worker)

    standin.set(0, xid=79)

    assert worker.wait(30) == 1, fleet.log(worker)[-3000:]
    assert read_gpus(redis_client).leases == ()
    assert check_gpu_leases(read_gpus(redis_client)).grade is Grade.WARN
    eventually(lambda: not fleet.client.fleet())
    successor = fleet.start_worker("onnx", environ={**standin.environ, **gpu_build})
    assert fleet.client.fleet()[0].gpus == (standin.uuids[1],)
    successor.terminate()
    assert successor.wait(30) == 0
    assert read_gpus(redis_client).leases == ()


@pytest.mark.timeout(170)
def test_a_worker_that_gets_no_gpu_ends_with_a_clear_message(
    machine, make_fleet, gpu_build, redis_client: redis.Redis
) -> None:
    """Status 1 and one message, no traceback; without GPUs, or without an engine that wants one, nothing is leased."""
    standin: StandIn = machine(1)
    fleet: FleetUnderTest = make_fleet(optimization={"devices": {"wait_seconds": 0}})
    on_cpu = fleet.start_worker("fake", environ={**standin.environ, **gpu_build})
    assert fleet.client.fleet()[0].gpus == ()
    redis_client.zadd("muai:gpu:marked", {standin.uuids[0]: 9e15})
    redis_client.hset("muai:gpu:marks", standin.uuids[0], "Xid 79")

    refused = fleet.start_worker("onnx", environ={**standin.environ, **gpu_build}, wait=False)

    assert refused.wait(60) == 1
    assert "this worker needs 1 GPU (onnx: optimization.onnx.execution_providers)" in fleet.log(refused)
    assert "Xid 79" in fleet.log(refused)
    assert "Traceback" not in fleet.log(refused)
    assert on_cpu.poll() is None
