"""What a rank does before it can answer: joins the others, loads its part of the model, hands it to DeepSpeed."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

# DeepSpeed reads this when it is imported, and warns at length where it has to guess.
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import numpy as np
import torch.distributed as dist
import transformers
from deepspeed.module_inject.auto_tp import AutoTP

from shared.errors import EngineLoadError
from shared.settings import DeepSpeedSettings, ModelSpec
from workers.engines.common.lengths import Padded
from workers.engines.common.roles import GENERATING
from workers.engines.common.sampling import Scores
from workers.engines.common.text import TextCodec, first_line, task_prefixes
from workers.engines.common.weights import context_of, load_weights
from workers.engines.deepspeed.stage import Place, StageModel, cut
from workers.engines.deepspeed.wire import Channel
from workers.engines.pytorch.model import TorchModel, memory_errors, torch_dtype

LOOPBACK = "127.0.0.1"
COLLECTIVE_TIMEOUT = timedelta(hours=1)
"""Only a last resort: the worker looks after ranks that hang, and knows sooner."""
TOLERANCE = 0.05
"""Largest difference of what DeepSpeed made from the model as it was, as a share of the largest score."""


def join(place: Place, device: torch.device, links: Sequence[Channel]) -> None:
    """Make the process group. The leader's store is on a port that the system chose: none can be taken meanwhile."""
    port = 0 if place.rank == 0 else links[0].receive()[0]["port"]
    store = dist.TCPStore(  # type: ignore[attr-defined]
        LOOPBACK, port, place.world, is_master=place.rank == 0, wait_for_workers=False
    )
    if place.rank == 0:
        for link in links:
            link.send({"port": store.port})
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the ranks are on one machine, whatever its name resolves to
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store, rank=place.rank, world_size=place.world, timeout=COLLECTIVE_TIMEOUT,
    )  # fmt: skip
    # DeepSpeed's shared-memory reduction for CPUs is compiled on first use (which takes a compiler and most of a
    # minute), spins while it waits, takes no account of groups, and leaves its memory behind when a rank is killed.
    compatible = getattr(deepspeed.ops, "__compatible_ops__", {})
    compatible["deepspeed_shm_comm"] = False
    with quiet():
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def own_device(place: Place) -> torch.device:
    """The rank's GPU, or the CPU where there is none. Raises :class:`EngineLoadError` where there are too few."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if torch.cuda.device_count() < place.world:
        raise EngineLoadError(
            f"tensor_parallel={place.tensor} and pipeline_parallel={place.pipeline} take {place.world} GPUs; "
            f"{torch.cuda.device_count()} can be seen"
        )
    return torch.device("cuda", place.rank)


class Loader:
    """Loads one rank's part. ``notes`` are sentences for the log: what is not as it was configured, and why."""

    def __init__(self, spec: ModelSpec, configured: DeepSpeedSettings, place: Place, device: torch.device) -> None:
        self.spec = spec
        self.configured = configured
        self.place = place
        self.device = device
        self.notes: list[str] = []
        self.kernels = False
        self.dtype = self._dtype()
        self._group: Any = None
        self._whole: list[Scores] = []

    def load(self) -> TorchModel:
        """The rank's part, ready to run.

        Raises :class:`EngineLoadError`, or :class:`~shared.errors.EngineOutOfMemory` where it does not fit.
        """
        transformers.utils.logging.disable_progress_bar()
        with quiet(), memory_errors():
            self._make_groups()
            model = load_weights(self.spec, self.dtype)
            if self.configured.zero_offload != "none":
                return self._offload(model)
            kernels = self._may_have_kernels(model)
            if self.place.last and (kernels or self.place.tensor > 1):
                self._whole = probe(TorchModel(self.spec, model, self._codec(model), torch.device("cpu")))
            if kernels:
                injected = self._with_kernels(model)
                if injected is not None:
                    return injected
                model = load_weights(self.spec, self.dtype)
            return self._without_kernels(model)

    def _dtype(self) -> torch.dtype:
        dtype = torch_dtype(self.configured.dtype, self.device)
        if dtype == torch.float16 and self.device.type == "cpu":
            self.notes.append("half precision is for GPUs: on this CPU the weights are float32")
            return torch.float32
        return dtype

    def _make_groups(self) -> None:
        """A group for each stage's tensor-parallel ranks. Every rank has to make all of them."""
        if self.place.tensor > 1:
            for stage in range(self.place.pipeline):
                first = stage * self.place.tensor
                group = dist.new_group(list(range(first, first + self.place.tensor)), timeout=COLLECTIVE_TIMEOUT)
                if stage == self.place.stage:
                    self._group = group

    def _without_kernels(self, model: Any) -> TorchModel:
        """The model's own layers; cut by AutoTP, which has rules for names of layers, they must still say the same."""
        loaded = self._wrap(self._inject(model, kernels=False))
        if self.place.tensor > 1:
            problem = self._problem(loaded)
            if not self._all_agree(not problem):
                raise EngineLoadError(
                    f"tensor_parallel={self.place.tensor}: DeepSpeed's AutoTP does not cut {self.spec.name!r} "
                    f"({model.config.model_type}) rightly: {problem or 'see the last stage'}; set it to 1"
                )
        return loaded

    def _inject(self, model: Any, *, kernels: bool) -> Any:
        """The weights through ``deepspeed.init_inference``."""
        if self.place.pipeline > 1:
            cut(model, self.place)
        tensor: dict[str, Any] = {"tp_size": self.place.tensor}
        if self._group is not None:
            # Both are needed: the one places the stage's group in the engine, the other in the layers it makes.
            tensor |= {"mpu": _Unit(self._group, self.place), "tp_group": self._group}
        try:
            engine = deepspeed.init_inference(
                model, tensor_parallel=tensor, dtype=self.dtype, replace_with_kernel_inject=kernels,
                max_out_tokens=context_of(self.spec, model.config) or 1024,
            )  # fmt: skip
        except (AssertionError, ValueError, KeyError, AttributeError, ImportError) as error:
            raise EngineLoadError(
                f"DeepSpeed cannot prepare {self.spec.name!r} ({model.config.model_type}) with "
                f"tensor_parallel={self.place.tensor}: {first_line(error)}"
            ) from error
        return engine.module.eval()

    def _codec(self, model: Any) -> TextCodec:
        return TextCodec(self.spec, context_of(self.spec, model.config, model), task_prefixes(model.config))

    def _wrap(self, module: Any) -> TorchModel:
        model = StageModel(module, self.place, self.device, self.dtype) if self.place.pipeline > 1 else module
        return TorchModel(self.spec, model, self._codec(module), self.device)

    def _problem(self, loaded: TorchModel) -> str:
        """What is wrong with what ``loaded`` says, by the ranks that have it; empty where nothing is."""
        found = probe(loaded)
        return deviation(found, self._whole) if self.place.last else ""

    def _all_agree(self, mine: bool) -> bool:
        verdict = torch.tensor([int(mine)], device=self.device)
        dist.all_reduce(verdict, op=dist.ReduceOp.MIN)
        return bool(verdict.item())

    # --- DeepSpeed's own kernels ----------------------------------------------------------------------------------

    def _may_have_kernels(self, model: Any) -> bool:
        if not self.configured.replace_with_kernel_inject:
            return False
        if self.device.type == "cpu":
            why = "DeepSpeed's kernels are for GPUs"
        elif self.place.pipeline > 1:
            why = "it is cut into stages"
        elif not AutoTP.kernel_supported(AutoTP.get_module_list(model)):
            why = f"DeepSpeed has no kernels for {type(model).__name__}"
        else:
            return True
        self.notes.append(f"{self.spec.name!r} runs without kernel injection: {why}")
        return False

    def _with_kernels(self, model: Any) -> TorchModel | None:
        """The model with DeepSpeed's kernels, or ``None`` where they fail or do not give the model's own scores.

        They are made for the releases of transformers of their day, and may keep a cache of their own that cannot let
        rows go: what they answer decides.
        """
        injected: TorchModel | None = None
        try:
            injected = self._wrap(self._inject(model, kernels=True))
            problem = self._problem(injected)
        except Exception as error:  # noqa: BLE001 - compilers, kernels and models of different ages fail in many ways
            problem = first_line(error)
        if self._all_agree(not problem) and injected is not None:
            self.kernels = True
            return injected
        self.notes.append(f"{self.spec.name!r} runs without kernel injection: {problem or 'it failed on another rank'}")
        return None

    # --- ZeRO-Inference -------------------------------------------------------------------------------------------

    def _offload(self, model: Any) -> TorchModel:
        """The weights in CPU memory or on a disk; each layer's come to the device when it is its turn."""
        if self.configured.replace_with_kernel_inject:
            self.notes.append(f"{self.spec.name!r} runs without kernel injection: its weights are offloaded")
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        try:
            engine, *_ = deepspeed.initialize(model=model, config=zero_config(self.configured, self.dtype, self.device))
        except Exception as error:  # a missing libaio, a compiler, a folder: DeepSpeed has no error class of its own
            raise EngineLoadError(
                f"zero_offload={self.configured.zero_offload} cannot be used here: {first_line(error)}"
            ) from error
        loaded = self._wrap(engine.module.eval())
        loaded.memory_bytes = size  # the parameters themselves are empty until their layer runs
        return loaded


def zero_config(configured: DeepSpeedSettings, dtype: torch.dtype, device: torch.device) -> Mapping[str, Any]:
    """DeepSpeed's configuration for ZeRO stage 3 with offloaded parameters (ZeRO-Inference)."""
    offload: dict[str, Any] = {"device": configured.zero_offload, "pin_memory": device.type == "cuda"}
    if configured.zero_offload == "nvme":
        offload["nvme_path"] = configured.nvme_path
    return {
        "train_batch_size": 1,  # required, and without meaning when nothing is trained
        "train_micro_batch_size_per_gpu": 1,
        "fp16": {"enabled": dtype == torch.float16},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {"stage": 3, "offload_param": offload, "stage3_param_persistence_threshold": 0},
    }


def probe(model: TorchModel) -> list[Scores]:
    """What a model says to two rows of different length: prompts, a step, a row that leaves, another step."""
    vocabulary = model.model.config.vocab_size
    ids = (np.arange(2 * 9, dtype=np.int64).reshape(2, 9) * 37 + 5) % vocabulary
    mask = np.ones_like(ids)
    with torch.inference_mode():
        if not model.kinds & GENERATING:
            mask[0, 5:] = 0
            vectors = model.encode(Padded(ids, mask, np.zeros_like(ids)))
            return [vectors[0, :5], vectors[1]]
        mask[0, :4] = 0
        decoding = model.decoding()
        found = [decoding.prefill(ids, mask)]
        found.append(decoding.step(np.array([7, 8], dtype=np.int64) % vocabulary))
        scores = [logits.row(row) for logits in found for row in range(2)]
        decoding.keep([1])
        return [*scores, decoding.step(np.array([9], dtype=np.int64) % vocabulary).row(0)]


def deviation(found: Sequence[Scores], wanted: Sequence[Scores]) -> str:
    """What is wrong with ``found``; empty where it is near enough to ``wanted``."""
    worst = max(
        float(np.abs(a.astype(np.float64) - b).max() / max(np.abs(b).max(), 1e-9)) if a.shape == b.shape else np.inf
        for a, b in zip(found, wanted, strict=True)
    )
    if worst <= TOLERANCE:  # not true of a NaN
        return ""
    return f"their scores deviate from the model's own by {worst:.3g}"


class _Unit:
    """What DeepSpeed asks of a model parallel unit."""

    def __init__(self, group: Any, place: Place) -> None:
        self.get_model_parallel_group: Callable[[], Any] = lambda: group
        self.get_model_parallel_world_size: Callable[[], int] = lambda: place.tensor
        self.get_model_parallel_rank: Callable[[], int] = lambda: place.rank % place.tensor


@contextlib.contextmanager
def quiet() -> Any:
    """DeepSpeed prints what it does to the standard output; only its errors belong in a worker's log."""
    for name in ("DeepSpeed", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        yield
