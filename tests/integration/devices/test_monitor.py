"""When a held GPU counts as failed."""

from __future__ import annotations

import pytest

from shared.errors import EngineError, EngineOutOfMemory
from tests.integration.devices.scripted import Scripted
from tests.support.waiting import eventually
from workers.devices.monitor import (
    HARDWARE_MARK_SECONDS,
    SOFTWARE_MARK_SECONDS,
    DeviceMonitor,
    Failure,
    HealthPolicy,
    is_cuda_error,
)
from workers.devices.nvml import Reading

HELD = ("GPU-a", "GPU-b")


def policy() -> HealthPolicy:
    return HealthPolicy(HELD, max_cuda_errors=3)


def test_a_well_gpu_has_not_failed() -> None:
    """Old memory errors, unsupported counters and a faulty program's events are no failure."""
    judged = policy()
    for _ in range(3):
        readings = [Reading("GPU-a", uncorrected_ecc=4, xids=(13, 31, 43)), Reading("GPU-b")]
        assert judged.judge(readings) is None


@pytest.mark.parametrize(
    ("reading", "reason"),
    [
        (Reading("GPU-b", problem="GPU is lost"), "it no longer answers (GPU is lost)"),
        (Reading("GPU-b", xids=(13, 79, 48, 79)), "critical driver event: Xid 48, 79"),
        (Reading("GPU-b", uncorrected_ecc=5), "uncorrected memory errors rose from 4 to 5"),
    ],
)
def test_each_sign_of_a_failure_names_the_gpu_and_the_reason(reading: Reading, reason: str) -> None:
    judged = policy()
    judged.judge([Reading("GPU-a"), Reading("GPU-b", uncorrected_ecc=4)])

    assert judged.judge([Reading("GPU-a"), reading]) == Failure(("GPU-b",), reason, HARDWARE_MARK_SECONDS)


def test_repeated_cuda_errors_within_a_minute_are_a_failure_of_all_held_gpus() -> None:
    """The third within 60 s; errors further apart never add up. Which GPU it was is not known."""
    judged = policy()

    assert [judged.cuda_error(now) for now in (0, 40, 80, 130, 180)] == [None] * 5
    assert judged.cuda_error(185) == Failure(HELD, "3 CUDA errors within 60 s", SOFTWARE_MARK_SECONDS)


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (EngineError("torch: CUDA error: an illegal memory access was encountered"), True),
        (EngineError("onnx: CUBLAS_STATUS_EXECUTION_FAILED"), True),
        (EngineError("torch: CUDA out of memory. Tried to allocate"), False),
        (EngineOutOfMemory("CUDA error: out of memory"), False),
        (EngineError("the prompt is too long"), False),
        ("CUDA error", False),
    ],
)
def test_cuda_errors_are_told_from_others(outcome: object, expected: bool) -> None:
    assert is_cuda_error(outcome) is expected


def watched(check_seconds: float) -> tuple[Scripted, DeviceMonitor, list[Failure]]:
    source, failures = Scripted(), list[Failure]()
    monitor = DeviceMonitor(source, policy(), check_seconds, failures.append)
    monitor.start()
    eventually(lambda: source.reads, what="the first look")
    return source, monitor, failures


def test_a_failure_is_told_once_and_ends_the_watch() -> None:
    source, _, failures = watched(0.01)
    eventually(lambda: source.reads > 3)

    source.problem = "GPU is lost"

    assert source.closed.wait(10)
    assert [failure.reason for failure in failures] == ["it no longer answers (GPU is lost)"]


def test_reported_errors_are_judged_at_once() -> None:
    """Not only at the next look."""
    source, monitor, failures = watched(3600)

    for _ in range(3):
        monitor.report_cuda_error()

    assert source.closed.wait(10)
    assert [failure.gpus for failure in failures] == [HELD]


def test_closing_stops_the_watch() -> None:
    source, monitor, failures = watched(3600)

    monitor.close()

    assert source.closed.is_set()
    assert failures == []
