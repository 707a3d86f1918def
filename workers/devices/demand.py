"""How many GPUs the engines of a worker need, and what it says when they cannot be had. Nothing is asked of anybody."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shared.contract import EngineName
from shared.gpus import GpuBoard
from shared.settings import OptimizationSettings
from workers.devices.nvml import Gpu

_GPU_PROVIDERS = frozenset({"CUDAExecutionProvider", "TensorrtExecutionProvider"})


@dataclass(frozen=True, slots=True)
class Demand:
    """``count`` GPUs, any of them; with ``positions`` exactly those of the visible ones. ``why`` names the options."""

    count: int = 0
    positions: tuple[int, ...] = ()
    why: str = ""
    by_index: bool = False
    """Whether an engine reads ``CUDA_VISIBLE_DEVICES`` itself and understands only numbers in it."""


def demand_of(optimization: OptimizationSettings, engines: Iterable[EngineName]) -> Demand:
    """What a worker with these engines needs: they share its GPUs, so it is the most that one of them asks for.

    ``pytorch.device: cuda:N`` with N above 0 means that very GPU of the visible ones, as it does without leases; its
    number must then keep its meaning, so every GPU stays visible and exactly the needed ones are leased.
    """
    engines = tuple(engines)
    asks = {engine: _asked(optimization, engine) for engine in engines}
    count = max(asks.values(), default=0)
    if not count:
        return Demand()
    why = ", ".join(f"{engine}: {_OPTION[engine]}" for engine, asked in asks.items() if asked == count)
    by_index = EngineName.VLLM in engines
    position = _position(optimization.pytorch.device) if EngineName.PYTORCH in engines else 0
    if not position:
        return Demand(count, why=why, by_index=by_index)
    others = max((asked for engine, asked in asks.items() if engine is not EngineName.PYTORCH), default=0)
    positions = tuple(sorted({*range(others), position}))
    return Demand(len(positions), positions, why, by_index)


_OPTION = {
    EngineName.VLLM: "optimization.vllm.tensor_parallel_size * optimization.vllm.pipeline_parallel_size",
    EngineName.DEEPSPEED: "optimization.deepspeed.tensor_parallel and pipeline_parallel",
    EngineName.ONNX: "optimization.onnx.execution_providers",
    EngineName.PYTORCH: "optimization.pytorch.device",
}


def _asked(optimization: OptimizationSettings, engine: EngineName) -> int:
    if not optimization.engine_enabled(engine):
        return 0
    match engine:
        case EngineName.VLLM:
            return optimization.vllm.tensor_parallel_size * optimization.vllm.pipeline_parallel_size
        case EngineName.DEEPSPEED:
            return optimization.deepspeed.tensor_parallel * optimization.deepspeed.pipeline_parallel
        case EngineName.ONNX:
            return int(bool(_GPU_PROVIDERS & set(optimization.onnx.execution_providers)))
        case EngineName.PYTORCH:
            return int(optimization.pytorch.device != "cpu")
        case _:
            return 0


def _position(device: str) -> int:
    return int(device.partition(":")[2] or 0)


def candidates_of(demand: Demand, gpus: Sequence[Gpu]) -> list[Gpu]:
    """The GPUs that would do, the least loaded first."""
    wanted = [gpu for at, gpu in enumerate(gpus) if not demand.positions or at in demand.positions]
    return sorted((gpu for gpu in wanted if gpu.healthy and gpu.uuid), key=lambda gpu: gpu.load)


def visible_devices(demand: Demand, gpus: Sequence[Gpu], leased: Sequence[str]) -> dict[str, str]:
    """The variables that confine CUDA to the leased GPUs.

    By uuid, which means the same GPU whatever order CUDA counts in; by number, in NVML's order, only for an engine that
    reads nothing else (vLLM, https://github.com/vllm-project/vllm/issues/13815) and where no MIG slice is among them.
    """
    by_uuid = {gpu.uuid: gpu for gpu in gpus if gpu.uuid}
    chosen = list(by_uuid.values()) if demand.positions else [by_uuid[name] for name in leased]
    if demand.by_index and all(gpu.index >= 0 for gpu in chosen):
        return {
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "CUDA_VISIBLE_DEVICES": ",".join(str(gpu.index) for gpu in chosen),
        }
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpu.uuid for gpu in chosen)}


# --- what an operator reads ---------------------------------------------------------------------------------------


def too_few(demand: Demand, gpus: Sequence[Gpu]) -> str:
    """What to say where this machine could never give what is asked; empty where it could."""
    if demand.positions and demand.positions[-1] >= len(gpus):
        asked = f"optimization.pytorch.device names GPU {demand.positions[-1]} (counted from 0)"
    elif demand.count > len(gpus):
        asked = f"this worker needs {_number(demand.count)} ({demand.why})"
    else:
        return ""
    return (
        f"{asked}, and {_number(len(gpus))} can be seen here. Ask for fewer, make more visible (CUDA_VISIBLE_DEVICES, "
        "the GPUs that the container is given), or run this worker on another machine"
    )


def shortage(demand: Demand, gpus: Sequence[Gpu], board: GpuBoard, waited: float) -> str:
    """What to say where too few GPUs are free: a line for each GPU, and what can be done."""
    needed = "the GPUs at " + ", ".join(map(str, demand.positions)) if demand.positions else _number(demand.count)
    lines = [f"this worker needs {needed} ({demand.why}); they were not free for {waited:.0f} s:"]
    lines += [f"  {state_of(gpu, board)}" for gpu in gpus]
    lines.append(
        "Stop one of the holders, start fewer replicas, or raise optimization.devices.wait_seconds. For a worker on "
        "the CPU set optimization.pytorch.device: cpu, or only CPUExecutionProvider for onnx; for workers that "
        "are to share GPUs, at your own risk, optimization.devices.enabled: false"
    )
    return "\n".join(lines)


def state_of(gpu: Gpu, board: GpuBoard) -> str:
    """One GPU in one line: free, held by whom, marked why, or unwell."""
    label = f"{gpu.name} {gpu.uuid}".strip() if gpu.index < 0 else f"GPU {gpu.index} {gpu.name} {gpu.uuid}".strip()
    if not gpu.healthy:
        return f"{label}: not usable: {gpu.problem}"
    lease, mark = board.lease_of(gpu.uuid), board.mark_of(gpu.uuid)
    if lease is not None:
        holder = lease.holder
        text = f"held by {holder.worker} (pid {holder.pid} on {holder.host}, {lease.seconds_left:.0f} s left)"
        return f"{label}: {text}"
    if mark is not None:
        return f"{label}: marked for {mark.seconds_left:.0f} s more: {mark.reason}"
    return f"{label}: free"


def _number(count: int) -> str:
    return f"{count} GPU{'' if count == 1 else 's'}"
