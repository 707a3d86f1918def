"""The benchmarks and the fault suite in short: they end, print their figures and leave nothing."""

from __future__ import annotations

import math
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.faults.suite import SCENARIOS
from tests.support.fleet import ROOT
from tests.support.processes import environment, left_of, run_module
from tests.support.waiting import eventually

QUEUE = [
    "end_to_end_vs_celery", "end_to_end_vs_dramatiq", "worker_us_per_request", "producer_us_per_request",
    "idle_p50_ms", "idle_p99_ms", "floor_p50_ms", "floor_p99_ms", "idle_p50_vs_floor", "idle_p99_vs_floor",
    "commands_per_message_8_idle_vs_1", "cost_at_1m_vs_1k", "idle_worker_cpu_percent",
]  # fmt: skip
VLLM = ["fleet_vs_engine_vllm", "fleet_vs_vllm_serve", "vllm_vs_pytorch_unbatched"]
OTHERS = ["fleet_vs_engine_pytorch", "fleet_vs_engine_onnx", "fleet_vs_engine_deepspeed"]


def installed(*libraries: str) -> pytest.MarkDecorator:
    """Skips where one of these is not installed."""
    missing = [library for library in libraries if find_spec(library) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed: make setup-engines")


def figures(text: str) -> dict[str, float]:
    """The lines ``name: value`` of an output."""
    return {name: float(value) for name, value in re.findall(r"^(\S.*): (-?[\d.]+|inf|nan)$", text, re.MULTILINE)}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("command", "names"),
    [
        pytest.param("bench_queue", QUEUE, id="queue"),
        pytest.param("bench_batching", ["batched_vs_unbatched", "lone_caller_cost"], id="batching"),
        pytest.param(
            "bench_overload", ["throughput_kept_beside_a_flood", "low_priority_share_beside_a_flood"], id="overload"
        ),
        pytest.param("bench_engines --engines vllm", VLLM, id="vllm", marks=installed("vllm", "aiohttp")),
        pytest.param(
            "bench_engines --engines pytorch,onnx,deepspeed", OTHERS, id="engines", marks=installed("deepspeed")
        ),
    ],
)
def test_a_benchmark_prints_its_figures_and_leaves_nothing(command: str, names: list[str]) -> None:
    """All of what it measures is there, as finite numbers; no process of it runs on."""
    environ = environment()

    done = run_module([*f"tests.benchmarks.{command}".split(), "--short"], environ, 1780)

    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = figures(done.stdout)
    assert set(names) <= set(found), done.stdout
    assert all(map(math.isfinite, found.values())), found
    eventually(lambda: not left_of(environ), what="the end of all processes")


@pytest.mark.timeout(300)
def test_the_fault_suite_prints_its_figures(tmp_path: Path) -> None:
    """``make faults ONLY=broker-full`` in short: a line a figure, and logs where they are asked for."""
    environ = environment()

    done = run_module(["tests.faults", "--short", "--only", "broker-full", "--keep", str(tmp_path)], environ, 280)

    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert {"broker-full/ids", "broker-full/lost", "broker-full/seconds"} <= set(figures(done.stdout))
    assert list(tmp_path.glob("broker-full/worker-*.log"))
    eventually(lambda: not left_of(environ), what="the end of all processes")


def test_every_fault_is_run_in_short_by_a_test() -> None:
    """A scenario that only ``make faults`` knows is noticed here."""
    run = "".join(file.read_text() for file in (ROOT / "tests/faults").glob("test_*.py"))

    assert [name for name in SCENARIOS if f'"{name}"' not in run] == []
