"""How many GPUs a worker asks for, which it prefers, and what it says when it gets none."""

from __future__ import annotations

import pytest

from producer.doctor.broker import check_gpu_leases
from shared.contract import EngineName
from shared.findings import Grade
from shared.gpus import GpuBoard, GpuHolder, GpuLease, GpuMark
from shared.settings import OptimizationSettings
from workers.devices.demand import Demand, candidates_of, demand_of, shortage, too_few, visible_devices
from workers.devices.nvml import Gpu

VLLM, DEEPSPEED, ONNX, PYTORCH, FAKE = EngineName
GPUS = [Gpu(index, f"GPU-{index}", "L4", memory_used_bytes=used) for index, used in enumerate([5, 3, 9])]
BOARD = GpuBoard(
    leases=(GpuLease(uuid="GPU-0", holder=GpuHolder(worker="w1", host="h", pid=7), seconds_left=12.3),),
    marks=(GpuMark(uuid="GPU-1", reason="Xid 79", seconds_left=3000),),
)


@pytest.mark.parametrize(
    ("options", "engines", "count"),
    [
        ({}, [FAKE], 0),
        ({}, [], 0),
        ({}, [PYTORCH], 1),
        ({"pytorch": {"device": "cpu"}}, [PYTORCH], 0),
        ({"pytorch": {"device": "cuda:0"}}, [PYTORCH], 1),
        ({"vllm": {"tensor_parallel_size": 4}}, [VLLM, PYTORCH], 4),
        ({"deepspeed": {"tensor_parallel": 2, "pipeline_parallel": 2}}, [DEEPSPEED], 4),
        ({"onnx": {"execution_providers": ["CPUExecutionProvider"]}}, [ONNX], 0),
        ({"onnx": {"execution_providers": ["TensorrtExecutionProvider"]}}, [ONNX], 1),
        ({"vllm": {"enabled": False}}, [VLLM], 0),
    ],
)
def test_a_worker_needs_the_most_that_one_of_its_engines_needs(options, engines, count) -> None:
    assert demand_of(OptimizationSettings.model_validate(options), engines).count == count


def test_a_numbered_device_means_that_gpu() -> None:
    """``cuda:2`` leases the third visible GPU and leaves the numbering as it is; another engine's come with it."""
    options = OptimizationSettings.model_validate({"pytorch": {"device": "cuda:2"}})

    alone, with_onnx = demand_of(options, [PYTORCH]), demand_of(options, [PYTORCH, ONNX])

    assert (alone.count, [gpu.uuid for gpu in candidates_of(alone, GPUS)]) == (1, ["GPU-2"])
    assert with_onnx.positions == (0, 2)
    assert visible_devices(alone, GPUS, ["GPU-2"]) == {"CUDA_VISIBLE_DEVICES": "GPU-0,GPU-1,GPU-2"}
    assert "names GPU 2" in too_few(alone, GPUS[:2])


def test_the_least_loaded_healthy_gpus_come_first() -> None:
    """By memory in use; one that is unwell or cannot be named is no candidate."""
    unwell = [Gpu(3, "GPU-3", healthy=False), Gpu(4, "", healthy=False)]

    assert [gpu.index for gpu in candidates_of(Demand(1), [*GPUS, *unwell])] == [1, 0, 2]


def test_cuda_is_confined_by_uuid_and_by_number_where_nothing_else_is_understood() -> None:
    """VLLM reads the variable itself, as numbers."""
    slice_ = Gpu(-1, "MIG-1")

    assert visible_devices(Demand(2), GPUS, ["GPU-2", "GPU-0"]) == {"CUDA_VISIBLE_DEVICES": "GPU-2,GPU-0"}
    assert visible_devices(Demand(2, by_index=True), GPUS, ["GPU-2", "GPU-0"]) == {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": "2,0",
    }
    assert visible_devices(Demand(1, by_index=True), [slice_], ["MIG-1"]) == {"CUDA_VISIBLE_DEVICES": "MIG-1"}


def test_a_shortage_says_who_holds_what_and_what_to_do() -> None:
    """A line for each GPU: held, marked, unwell or free; then the ways out."""
    gpus = [*GPUS, Gpu(3, "GPU-3", "L4", healthy=False, problem="GPU is lost")]

    text = shortage(Demand(2, why="vllm: optimization.vllm.tensor_parallel_size"), gpus, BOARD, 60)

    assert text.splitlines()[:5] == [
        "this worker needs 2 GPUs (vllm: optimization.vllm.tensor_parallel_size); they were not free for 60 s:",
        "  GPU 0 L4 GPU-0: held by w1 (pid 7 on h, 12 s left)",
        "  GPU 1 L4 GPU-1: marked for 3000 s more: Xid 79",
        "  GPU 2 L4 GPU-2: free",
        "  GPU 3 L4 GPU-3: not usable: GPU is lost",
    ]
    assert "optimization.devices.wait_seconds" in text


def test_a_machine_that_is_too_small_is_named_at_once() -> None:
    assert "needs 4 GPUs (x), and 3 GPUs can be seen here" in too_few(Demand(4, why="x"), GPUS)
    assert too_few(Demand(3), GPUS) == ""


def test_the_doctor_lists_leases_and_marks() -> None:
    """One finding: well without marks, a warning with the way to mend it where there are some."""
    none, leased, marked = (check_gpu_leases(board) for board in (GpuBoard(), GpuBoard(leases=BOARD.leases), BOARD))

    assert (none.grade, none.detail) == (Grade.OK, "none leased")
    assert (leased.grade, leased.detail) == (Grade.OK, "1 leased: GPU-0 by w1 (pid 7, 12 s left)")
    assert marked.grade is Grade.WARN
    assert "GPU-1 for 3000 s more: Xid 79" in marked.detail
    assert "ZREM muai:gpu:marked GPU-1" in marked.remedy
