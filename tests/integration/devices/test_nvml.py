"""What is found with NVML: the stand-in library, loaded by a process of its own as the driver's is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from ctypes.util import find_library
from typing import Any

import pytest

from tests.integration.devices.nvml.standin import StandIn, StandInGpu, uuid_of
from tests.support.fleet import ROOT
from workers.devices.nvml import Gpu, permitted

Ask = Callable[..., Any]


@pytest.fixture
def probe() -> Iterator[Callable[[dict[str, str]], Ask]]:
    """Starts a process that looks at GPUs with the given variables, and asks it."""
    with ExitStack() as stack:

        def start(environ: dict[str, str]) -> Ask:
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.integration.devices.nvml.probe"],
                    cwd=ROOT, env={**os.environ, **environ}, text=True,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                )
            )  # fmt: skip
            stack.callback(process.stdin.close)

            def ask(command: str, argument: Any) -> Any:
                process.stdin.write(json.dumps([command, argument]) + "\n")
                process.stdin.flush()
                return json.loads(process.stdout.readline())

            return ask

        yield start


def test_gpus_are_found_with_their_load(machine, probe) -> None:
    """Index, uuid, memory in bytes, utilisation and temperature of each."""
    standin: StandIn = machine(2)
    standin.set(1, used_mb=512, load=30)
    ask = probe(standin.environ)

    found = ask("detect", None)

    assert [gpu["uuid"] for gpu in found["gpus"]] == standin.uuids
    assert found["gpus"][1] == {
        "index": 1, "uuid": uuid_of(1), "name": "Stand-in 16384 MB", "memory_total_bytes": 16384 << 20,
        "memory_used_bytes": 512 << 20, "utilization_percent": 30, "temperature_celsius": 40, "healthy": True,
        "problem": "",
    }  # fmt: skip


def test_the_operators_choice_is_respected(machine, probe) -> None:
    """Indices, uuids, none at all, and a MIG slice that only its uuid names."""
    standin: StandIn = machine(3)
    standin.add(StandInGpu("MIG-55555555-0000-0000-0000-000000000000", slice=True))
    ask = probe(standin.environ)

    def uuids(visible: str | None) -> list[str]:
        return [gpu["uuid"] for gpu in ask("detect", visible)["gpus"]]

    assert uuids(None) == standin.uuids[:3]
    assert uuids("2,0") == [uuid_of(2), uuid_of(0)]
    assert uuids(uuid_of(1)[:8]) == [uuid_of(1)]
    assert uuids("") == []
    assert uuids("MIG-55555555-0000-0000-0000-000000000000") == ["MIG-55555555-0000-0000-0000-000000000000"]
    assert ask("detect", "-1")["reason"] == "CUDA_VISIBLE_DEVICES='-1' allows none"


def test_a_lost_gpu_is_seen_and_the_others_stay(machine, probe) -> None:
    """A GPU that fell off the bus is listed with its problem; breaking one while the process runs is noticed."""
    standin: StandIn = machine(2)
    ask = probe(standin.environ)
    assert [reading["problem"] for reading in ask("read", standin.uuids)] == ["", ""]

    standin.set(0, lost=True)

    assert [(gpu["healthy"], gpu["problem"]) for gpu in ask("detect", None)["gpus"]] == [
        (False, "GPU is lost"),
        (True, ""),
    ]
    assert [reading["problem"] for reading in ask("read", standin.uuids)] == ["GPU is lost", ""]


def test_memory_errors_and_driver_events_are_read(machine, probe) -> None:
    """Volatile uncorrected errors, where they are supported, and critical events since the last reading, each once."""
    standin: StandIn = machine(2)
    standin.set(1, ecc=-1)
    ask = probe(standin.environ)
    before = ask("read", standin.uuids)
    standin.set(0, ecc=2, xid=79)

    after = ask("read", standin.uuids)
    later = ask("read", standin.uuids)

    assert [(r["uncorrected_ecc"], r["xids"]) for r in before] == [(0, []), (None, [])]
    assert [(r["uncorrected_ecc"], r["xids"]) for r in after] == [(2, [79]), (None, [])]
    assert [r["xids"] for r in later] == [[], []]


def test_an_event_of_a_lost_gpu_is_its_own(machine, probe) -> None:
    """The driver's event says which GPU fell off the bus even though it no longer answers."""
    standin: StandIn = machine(2)
    ask = probe(standin.environ)
    ask("read", standin.uuids)

    standin.set(1, lost=True, xid=79)

    assert [r["xids"] for r in ask("read", standin.uuids)] == [[], [79]]


def test_a_machine_without_a_driver_or_library_has_no_gpus(machine, probe) -> None:
    """No driver, and no library at all: an empty list and a reason, no error."""
    environ = machine(1).environ

    no_driver = probe({**environ, "NVML_STATE": "/nowhere"})("detect", None)

    assert (no_driver["gpus"], no_driver["reason"]) == ([], "NVML: Driver Not Loaded")
    if find_library("nvidia-ml") is None:  # else this machine has a driver
        no_library = probe({"LD_LIBRARY_PATH": ""})("detect", None)
        assert (no_library["gpus"], no_library["reason"]) == ([], "NVML: NVML Shared Library Not Found")


def test_a_missing_binding_is_a_reason(tmp_path, probe) -> None:
    """Without nvidia-ml-py there are no GPUs, and the reason names what to install."""
    (tmp_path / "pynvml.py").write_text("raise ImportError")
    ask = probe({"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"})

    found = ask("detect", "0")

    assert (found["gpus"], "muai-fleet[gpu]" in found["reason"]) == ([], True)


A, B, C = (Gpu(index, uuid) for index, uuid in enumerate(["GPU-aa11", "GPU-ab22", "GPU-cc33"]))


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [A, B, C]),
        ("1", [B]),
        (" 2 , 0 ", [C, A]),
        ("0,0,1", [A, B]),
        ("GPU-cc33,GPU-aa11", [C, A]),
        ("gpu-CC", [C]),
        ("0,-1,1", [A]),
        ("NoDevFiles", []),
        ("", []),
    ],
)
def test_visible_devices_are_read_as_cuda_reads_them(visible: str | None, expected: list[Gpu]) -> None:
    """Order kept, repetitions dropped, shortened uuids allowed, and -1 ends the list."""
    assert permitted([A, B, C], visible) == expected


@pytest.mark.parametrize(("visible", "problem"), [("GPU-a", "several GPUs match"), ("7", "there is no such GPU")])
def test_a_name_that_fits_no_single_gpu_is_a_problem(visible: str, problem: str) -> None:
    """It does not silently mean the CPU."""
    (gpu,) = permitted([A, B, C], visible)

    assert not gpu.healthy
    assert problem in gpu.problem


def test_slices_are_used_only_when_they_are_named() -> None:
    """A list of GPUs with slices in it means the GPUs."""
    mig = Gpu(-1, "MIG-1")

    assert permitted([A, mig], None) == [A]
    assert permitted([A, mig], "MIG-1") == [mig]
