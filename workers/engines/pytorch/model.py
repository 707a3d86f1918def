"""A transformers model in memory, run as it is, and what loading one takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from shared.errors import EngineError, EngineOutOfMemory
from shared.settings import ModelSpec, PyTorchSettings
from workers.engines.common.decoding import Decoding
from workers.engines.common.grouped_attention import group_heads
from workers.engines.common.lengths import Floats, Padded
from workers.engines.common.roles import Role, role_of
from workers.engines.common.scoring import Labels
from workers.engines.common.text import TextCodec, first_line, task_prefixes
from workers.engines.common.transformer import TransformerModel
from workers.engines.common.weights import context_of, eos_tokens, load_weights, pad_token, writing_of
from workers.engines.pytorch.compiler import ModelCompiler
from workers.engines.pytorch.decoding import Forward, TorchDecoding, TorchRewriting

_SPELLINGS = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


class TorchModel(TransformerModel):
    """A transformers model in memory; its forward pass is compiled where there is a ``compiler``."""

    def __init__(
        self,
        spec: ModelSpec,
        model: Any,
        codec: TextCodec,
        device: torch.device,
        compiler: ModelCompiler | None = None,
    ) -> None:
        self.spec = spec
        self.role = role_of(spec)
        self.kinds = frozenset(spec.kinds)
        self.model = model
        self.unwanted = set()
        self.codec = codec
        self.device = device
        self.max_context = codec.max_context
        self.precision = str(next(model.parameters()).dtype).removeprefix("torch.")
        self.memory_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        self.eos = eos_tokens(model, codec)
        self.pad = pad_token(model.config, codec)
        self.labels = Labels.of(model.config, spec) if self.role is Role.CLASSIFIER else None
        self._compiler = compiler
        self._forward: Forward = compiler.compile_model(model, spec.name) if compiler is not None else model
        self._writing = writing_of(spec, model) if self.role is Role.SEQ2SEQ else None
        self._takes_types = "token_type_ids" in inspect.signature(model.forward).parameters

    def running(self) -> AbstractContextManager[None]:
        """Without gradients, and with torch's errors as the fleet's."""
        return _inference()

    def decoding(self) -> Decoding:
        """A new batch of a decoder or of a sequence-to-sequence model."""
        if self._writing is not None:
            return TorchRewriting(self.model, self._forward, self.device, self._writing)
        return TorchDecoding(self.model, self._forward, self.device)

    def encode(self, texts: Padded) -> Floats:
        """Token vectors of the last layer; a decoder's are those under its head."""
        forward = self.model.base_model if self.role is Role.DECODER else self._forward
        return _array(forward(**self._arguments(texts)).last_hidden_state)

    def classify(self, texts: Padded) -> Floats:
        """The classification head's scores."""
        return _array(self._forward(**self._arguments(texts)).logits)

    def close(self) -> None:
        """Let the weights go."""
        if self._compiler is not None:
            self._compiler.forget(self.spec.name)
        del self.model, self._forward
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _arguments(self, texts: Padded) -> dict[str, torch.Tensor]:
        arrays = {"input_ids": texts.ids, "attention_mask": texts.mask}
        if self._takes_types:
            arrays["token_type_ids"] = texts.types
        return {name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()}


def load_model(spec: ModelSpec, configured: PyTorchSettings, compiler: ModelCompiler | None = None) -> TorchModel:
    """Load weights and tokenizer in the configured number format onto the configured device."""
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if configured.device == "auto" else configured.device
    )
    model = load_weights(spec, torch_dtype(configured.dtype, device))
    codec = TextCodec(spec, context_of(spec, model.config, model), task_prefixes(model.config))
    with memory_errors():
        model.to(device)
    group_heads(model, device)
    return TorchModel(spec, model, codec, device, compiler)


def _array(tensor: torch.Tensor) -> Floats:
    array: Floats = tensor.float().cpu().numpy()
    return array


@contextmanager
def _inference() -> Iterator[None]:
    with torch.inference_mode(), memory_errors():
        yield


def torch_dtype(name: str, device: torch.device) -> torch.dtype:
    """The configured number format; ``auto`` is float32 on a CPU and bfloat16 or float16 on a GPU."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, _SPELLINGS.get(name, name))
        return dtype
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn torch's ways to say that memory is out into :class:`EngineOutOfMemory`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise EngineOutOfMemory(first_line(error)) from error
    except RuntimeError as error:
        text = str(error)
        if "can't allocate memory" in text or "out of memory" in text:
            raise EngineOutOfMemory(first_line(error)) from error
        raise EngineError(f"torch: {first_line(error)}") from error
