"""A worker's GPUs from taking to releasing, with GPUs and health as the test says and a real broker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import redis

from shared.contract import EngineName
from shared.errors import EngineError, NoDeviceAvailable
from shared.settings import Settings
from tests.integration.devices.scripted import Scripted
from tests.support.waiting import eventually
from workers.devices.devices import Devices
from workers.devices.nvml import Detected, Gpu

TWO = Detected((Gpu(0, "GPU-a"), Gpu(1, "GPU-b", memory_used_bytes=1)))
ERROR = "torch: CUDA error: unspecified launch failure"


class Health(Scripted):
    """Readings for whatever is held."""

    def __call__(self, uuids: Sequence[str]) -> Health:
        return self


@pytest.fixture
def make(redis_client: redis.Redis):
    """Makes the devices of a worker: ``make(found, lease_seconds=1)``; its variables are in ``environ``."""
    made: list[Devices] = []

    def devices(found: Detected = TWO, environ: dict[str, str] | None = None, **options: Any) -> Devices:
        settings = Settings.model_validate({"optimization": {"devices": {"wait_seconds": 0, **options}}})
        health = Health()
        one = Devices(
            settings, redis_client, f"w{len(made)}", environ={} if environ is None else environ,
            detect=lambda visible: found, health=health,
            uses_cuda=lambda engine: engine is not EngineName.ONNX,
        )  # fmt: skip
        made.append(one)
        return one

    yield devices
    for one in made:
        one.release()


def reasons(devices: Devices) -> list[str]:
    told: list[str] = []
    devices.start(told.append)
    return told


@pytest.mark.parametrize(
    ("found", "options", "engine"),
    [
        (Detected(reason="the driver shows no GPU"), {}, EngineName.PYTORCH),
        (TWO, {"enabled": False}, EngineName.PYTORCH),
        (TWO, {}, EngineName.FAKE),
        (TWO, {}, EngineName.ONNX),  # built for the CPU
    ],
)
def test_nothing_happens_without_a_gpu_or_a_need(make: Callable[..., Devices], found, options, engine) -> None:
    """No lease, no variable, no watch; errors are ignored."""
    environ: dict[str, str] = {}
    devices = make(found, environ, **options)

    devices.acquire([engine])
    told = reasons(devices)
    for _ in range(5):
        devices.report_cuda_error()

    assert (devices.gpus, devices.valid, environ, told) == ((), False, {}, [])


def test_taking_confines_cuda_and_releasing_gives_back(make) -> None:
    """The less loaded GPU first; each worker gets its own; a third is refused until one is released."""
    environ: dict[str, str] = {}
    first, second, third = make(environ=environ), make(), make()
    first.acquire([EngineName.PYTORCH])
    second.acquire([EngineName.PYTORCH])

    assert (first.gpus, second.gpus, environ) == (("GPU-a",), ("GPU-b",), {"CUDA_VISIBLE_DEVICES": "GPU-a"})
    with pytest.raises(NoDeviceAvailable, match="held by w0"):
        third.acquire([EngineName.PYTORCH])
    first.release()
    first.release()
    third.acquire([EngineName.PYTORCH])
    assert third.gpus == ("GPU-a",)


def test_waiting_ends_when_a_gpu_is_released(make) -> None:
    """The check is called meanwhile, and here makes room."""
    holder, waiter = make(Detected((Gpu(0, "GPU-a"),))), make(Detected((Gpu(0, "GPU-a"),)), wait_seconds=60)
    holder.acquire([EngineName.PYTORCH])
    calls: list[int] = []

    def check() -> None:
        calls.append(1)
        if len(calls) == 2:
            holder.release()

    waiter.acquire([EngineName.PYTORCH], check=check)

    assert (waiter.gpus, len(calls)) == (("GPU-a",), 2)


def test_waiting_ends_when_the_check_raises(make) -> None:
    """A worker that is told to stop does not wait for a GPU first."""
    make().acquire([EngineName.PYTORCH])
    make().acquire([EngineName.PYTORCH])

    def check() -> None:
        raise SystemExit(0)

    with pytest.raises(SystemExit):
        make(wait_seconds=60).acquire([EngineName.PYTORCH], check=check)


# Requirements: 11.4
def test_repeated_cuda_errors_end_the_worker_and_mark_the_gpu(make) -> None:
    """Members of one batch share an error, which counts once; the third error is a failure."""
    devices = make()
    devices.acquire([EngineName.PYTORCH])
    told = reasons(devices)
    for _ in range(2):
        error = EngineError(ERROR)
        for _ in range(8):
            devices.saw(error)
    devices.saw(EngineError("the prompt is too long"))
    assert (told, devices.problems) == ([], {})

    devices.saw(EngineError(ERROR))

    eventually(lambda: told)
    assert told == ["GPU-a failed: 3 CUDA errors within 60 s"]
    assert devices.problems == {"GPU-a": "3 CUDA errors within 60 s"}
    fresh = make()
    fresh.acquire([EngineName.PYTORCH])
    assert fresh.gpus == ("GPU-b",)


def test_a_lease_that_is_lost_while_models_load_is_told_at_the_start(make, redis_client) -> None:
    """The watch begins after the loading, the renewing before it."""
    devices = make(lease_seconds=0.3)
    devices.acquire([EngineName.PYTORCH])
    redis_client.hset("muai:gpu:holders", "GPU-a", 'another\n{"worker":"b","host":"h","pid":1}')
    eventually(lambda: not devices.valid, what="the loss")

    told = reasons(devices)

    eventually(lambda: told)
    assert told == ["the lease of GPU-a expired and another worker has it"]
    assert devices.problems == {}
