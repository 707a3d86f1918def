"""The PyTorch engine: transformers models, run as they are."""

from __future__ import annotations

from importlib.util import find_spec
from typing import ClassVar

import torch

from shared.contract import EngineName, Feature
from shared.settings import ModelSpec, Settings
from workers.engines.base import Availability, Engine
from workers.engines.common.grouped_attention import group_heads
from workers.engines.common.text import TextCodec, require_path, task_prefixes
from workers.engines.common.weights import context_of, load_weights
from workers.engines.pytorch.compiler import ModelCompiler
from workers.engines.pytorch.model import TorchModel, memory_errors

_SPELLINGS = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


class PyTorchEngine(Engine):
    """Loads transformers models."""

    name = EngineName.PYTORCH
    features: ClassVar[frozenset[Feature]] = frozenset({Feature.LOGPROBS})

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.compiler = ModelCompiler(settings.optimization.pytorch)

    @classmethod
    def availability(cls, settings: Settings) -> Availability:
        """Whether torch and transformers are installed."""
        missing = [package for package in ("torch", "transformers") if find_spec(package) is None]
        if missing:
            return Availability(False, f"{' and '.join(missing)} not installed", 'pip install "muai-fleet[pytorch]"')
        return Availability(True)

    def load(self, spec: ModelSpec) -> TorchModel:
        """Load weights and tokenizer; float32 on a CPU unless configured otherwise."""
        require_path(spec)
        configured = self.settings.optimization.pytorch
        device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if configured.device == "auto" else configured.device
        )
        model = load_weights(spec, torch_dtype(configured.dtype, device))
        codec = TextCodec(spec, context_of(spec, model.config, model), task_prefixes(model.config))
        with memory_errors():
            model.to(device)
        group_heads(model, device)
        return TorchModel(spec, model, codec, device, self.compiler if configured.compile else None)

    def close(self) -> None:
        """Let compiled models go."""
        self.compiler.close()


def torch_dtype(name: str, device: torch.device) -> torch.dtype:
    """The configured number format; ``auto`` is float32 on a CPU and bfloat16 or float16 on a GPU."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, _SPELLINGS.get(name, name))
        return dtype
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
