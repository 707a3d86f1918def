"""The PyTorch engine: transformers models, run as they are."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from shared.contract import EngineName, InferenceRequest, Kind
from shared.errors import EngineError, EngineLoadError, EngineOutOfMemory, UnsupportedKind
from shared.settings import ModelSpec, Settings
from workers.engines.base import Availability, Emit, Engine, LoadedModel
from workers.engines.decoding import Decoding, generate, positions
from workers.engines.embedding import Vectors, embed
from workers.engines.sampling import Logits, Scores, Tokens
from workers.engines.text import TextCodec, first_line, require_path

_SPELLINGS = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}

GENERATING = frozenset({Kind.GENERATE, Kind.CHAT})


class TensorLogits(Logits):
    """Scores on the model's device; only what is asked for leaves it."""

    def __init__(self, scores: torch.Tensor) -> None:
        self._scores = scores

    def best(self) -> tuple[Tokens, Scores]:
        """The most likely token of each row and its score."""
        values, tokens = self._scores.max(dim=-1)
        return tokens.cpu().numpy(), values.float().cpu().numpy()

    def row(self, index: int) -> Scores:
        """The scores of one row."""
        row: Scores = self._scores[index].float().cpu().numpy()
        return row


class TorchDecoding(Decoding):
    """One batch through a causal language model."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._last_only = (
            {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        )
        self._cache: Any = None
        self._mask = torch.empty(0)
        self._next = torch.empty(0)

    def prefill(self, ids: Tokens, mask: Tokens) -> Logits:
        """Read the prompts."""
        place = positions(mask)
        self._mask = torch.from_numpy(mask).to(self._device)
        self._next = torch.from_numpy(place[:, -1:] + 1).to(self._device)
        return self._forward(torch.from_numpy(ids).to(self._device), torch.from_numpy(place).to(self._device))

    def step(self, tokens: Tokens) -> Logits:
        """Append one token to each row."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        at = self._next
        self._next = at + 1
        return self._forward(torch.from_numpy(tokens).to(self._device)[:, None], at)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        index = torch.tensor(rows, device=self._device)
        self._cache.batch_select_indices(index)
        self._mask = self._mask[index]
        self._next = self._next[index]

    def _forward(self, ids: torch.Tensor, place: torch.Tensor) -> Logits:
        out = self._model(
            input_ids=ids, attention_mask=self._mask, position_ids=place, past_key_values=self._cache, use_cache=True,
            **self._last_only,
        )  # fmt: skip
        self._cache = out.past_key_values
        return TensorLogits(out.logits[:, -1])


class TorchModel(LoadedModel):
    """A transformers model in memory."""

    def __init__(self, spec: ModelSpec, model: Any, codec: TextCodec, device: torch.device) -> None:
        self.spec = spec
        self.model = model
        self.codec = codec
        self.device = device
        self.max_context = codec.max_context
        self.kinds = served_kinds(spec, model.config)
        self.memory_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        self.eos = eos_tokens(model.config, getattr(model, "generation_config", None), codec)
        self.pad = pad_token(model.config, codec)
        self._takes_types = "token_type_ids" in inspect.signature(model.forward).parameters

    def infer(self, requests: Sequence[InferenceRequest], emit: Emit) -> None:
        """Run a batch of one kind."""
        kind = requests[0].kind
        with torch.inference_mode(), memory_errors():
            if kind in GENERATING and kind in self.kinds:
                generate(requests, self.codec, TorchDecoding(self.model, self.device), self.eos, self.pad, emit)
            elif kind in self.kinds:
                embed(requests, self.codec, self.spec, self.pad, self.encode, emit)
            else:
                for index in range(len(requests)):
                    emit(index, UnsupportedKind(f"model {self.spec.name!r} does not serve {kind} requests"))

    def encode(self, ids: Tokens, mask: Tokens) -> Vectors:
        """Token vectors of the last layer."""
        extra = {"token_type_ids": torch.zeros(ids.shape, dtype=torch.long, device=self.device)}
        backbone = self.model.base_model if self.kinds & GENERATING else self.model
        out = backbone(
            input_ids=torch.from_numpy(ids).to(self.device),
            attention_mask=torch.from_numpy(mask).to(self.device),
            **(extra if self._takes_types else {}),
        )
        vectors: Vectors = out.last_hidden_state.float().cpu().numpy()
        return vectors

    def warmup(self) -> None:
        """Run two tokens once: kernels and lazy modules are then in place."""
        ids = np.full((1, 2), self.pad, dtype=np.int64)
        mask = np.ones_like(ids)
        with torch.inference_mode(), memory_errors():
            if self.kinds & GENERATING:
                TorchDecoding(self.model, self.device).prefill(ids, mask)
            else:
                self.encode(ids, mask)

    def close(self) -> None:
        """Let the weights go."""
        del self.model
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class PyTorchEngine(Engine):
    """Loads transformers models."""

    name = EngineName.PYTORCH

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
        transformers.utils.logging.disable_progress_bar()
        configured = self.settings.optimization.pytorch
        device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if configured.device == "auto" else configured.device
        )
        dtype = torch_dtype(configured.dtype, device)
        model = load_weights(spec, dtype)
        codec = TextCodec(spec, context_of(spec, model.config))
        with memory_errors():
            model.to(device)
        return TorchModel(spec, model, codec, device)


def load_weights(spec: ModelSpec, dtype: torch.dtype) -> Any:
    """The model on the CPU, ready for inference; raise :class:`EngineLoadError` where it cannot be had."""
    options = {"trust_remote_code": spec.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(spec.path, **options)
        cls = AutoModelForCausalLM if GENERATING & set(spec.kinds) else AutoModel
        model = cls.from_pretrained(spec.path, config=config, dtype=dtype, **options)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise EngineLoadError(f"cannot load {spec.name!r} from {spec.path!r}: {first_line(error)}") from error
    return model.eval()


def served_kinds(spec: ModelSpec, config: Any) -> frozenset[Kind]:
    """Which of the declared kinds this engine can answer; raise :class:`EngineLoadError` where there is none."""
    able = GENERATING | {Kind.EMBED}
    kinds = frozenset(spec.kinds) & able
    if not kinds:
        raise EngineLoadError(
            f"model {spec.name!r} ({config.model_type}) is declared for {', '.join(spec.kinds)}; "
            f"this engine serves {', '.join(sorted(able))}"
        )
    return kinds


def context_of(spec: ModelSpec, config: Any) -> int | None:
    """The longest sequence in tokens: the model's own, and no more than is configured."""
    own = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    limits = [limit for limit in (own, spec.max_length) if limit]
    return min(limits) if limits else None


def eos_tokens(config: Any, generation_config: Any, codec: TextCodec) -> frozenset[int]:
    """The tokens that end an answer: the generation settings', else the model's, else the tokenizer's."""
    for value in (
        getattr(generation_config, "eos_token_id", None),
        getattr(config, "eos_token_id", None),
        codec.tokenizer.eos_token_id,
    ):
        if value is not None:
            return frozenset(value if isinstance(value, list) else [value])
    return frozenset()


def pad_token(config: Any, codec: TextCodec) -> int:
    """A token to pad with: which one does not matter, for padding is masked."""
    pad = codec.tokenizer.pad_token_id
    if pad is None:
        pad = getattr(config, "pad_token_id", None)
    return int(pad) if pad is not None else 0


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
