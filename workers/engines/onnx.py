"""The ONNX Runtime engine: models converted from PyTorch, run by ONNX Runtime."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from shared.contract import EngineName, InferenceRequest, Kind
from shared.errors import EngineError, EngineLoadError, EngineOutOfMemory, UnsupportedKind
from shared.settings import ModelSpec, OnnxSettings, Settings
from workers.engines.base import Availability, Emit, Engine, LoadedModel
from workers.engines.decoding import Decoding, generate, positions
from workers.engines.embedding import Vectors, embed
from workers.engines.onnx_export import GRAPH, Conversion, causal_bias, converted, padding_bias
from workers.engines.sampling import ArrayLogits, Logits, Tokens
from workers.engines.text import TextCodec, first_line, require_path

logger = logging.getLogger(__name__)

GENERATING = frozenset({Kind.GENERATE, Kind.CHAT})


class OnnxDecoding(Decoding):
    """One batch through a converted decoder. The cache stays in the runtime's memory from step to step."""

    def __init__(self, model: OnnxModel) -> None:
        self._model = model
        self._mask: Tokens = np.empty((0, 0), dtype=np.int64)
        self._next: Tokens = np.empty((0, 1), dtype=np.int64)
        self._past: list[Any] = []

    def prefill(self, ids: Tokens, mask: Tokens) -> Logits:
        """Read the prompts."""
        place = positions(mask)
        self._mask = mask
        self._next = place[:, -1:] + 1
        conversion = self._model.conversion
        empty = np.zeros((len(ids), conversion.kv_heads, 0, conversion.head_size), dtype=np.float32)
        self._past = [self._model.value(empty)] * (2 * conversion.layers)
        return self._forward(ids, place)

    def step(self, tokens: Tokens) -> Logits:
        """Append one token to each row."""
        self._mask = np.concatenate([self._mask, np.ones((len(tokens), 1), dtype=np.int64)], axis=1)
        at = self._next
        self._next = at + 1
        return self._forward(tokens[:, None], at)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        index = list(rows)
        self._mask = self._mask[index]
        self._next = self._next[index]
        self._past = [self._model.value(np.ascontiguousarray(value.numpy()[index])) for value in self._past]

    def _forward(self, ids: Tokens, place: Tokens) -> Logits:
        model = self._model
        feeds = {
            "ids": model.value(np.ascontiguousarray(ids)),
            "bias": model.value(causal_bias(self._mask, ids.shape[1])),
            "place": model.value(np.ascontiguousarray(place)),
            **dict(zip(model.conversion.past_names, self._past, strict=True)),
        }
        out = model.run(feeds)
        self._past = out[1:]
        return ArrayLogits(out[0].numpy())


class OnnxModel(LoadedModel):
    """A converted model in memory."""

    def __init__(self, spec: ModelSpec, session: Any, folder: Path, conversion: Conversion) -> None:
        self.spec = spec
        self.conversion = conversion
        self.codec = TextCodec(spec, conversion.max_context)
        self.max_context = conversion.max_context
        kinds = GENERATING if conversion.decoder else frozenset({Kind.EMBED})
        self.kinds = frozenset(spec.kinds) & kinds
        self.memory_bytes = sum(file.stat().st_size for file in folder.iterdir())
        self._session = session
        self._outputs = ["out", *conversion.present_names]
        self._inputs = {item.name for item in session.get_inputs()}
        self._device = "cuda" if "CUDAExecutionProvider" in session.get_providers() else "cpu"
        if not self.kinds:
            raise EngineLoadError(f"the onnx engine answers none of {', '.join(spec.kinds)} with {spec.name!r}")

    def value(self, array: Any) -> Any:
        """An array where the session runs."""
        from onnxruntime import OrtValue

        return OrtValue.ortvalue_from_numpy(array, self._device, 0)

    def run(self, feeds: dict[str, Any]) -> list[Any]:
        """One run of the graph; outputs stay where it ran."""
        if self._device == "cpu":
            found: list[Any] = self._session.run_with_ort_values(
                self._outputs, {name: value for name, value in feeds.items() if name in self._inputs}
            )
            return found
        binding = self._session.io_binding()
        for name, value in feeds.items():
            if name in self._inputs:
                binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, "cpu" if name == "out" else self._device)
        self._session.run_with_iobinding(binding)
        bound: list[Any] = binding.get_outputs()
        return bound

    def infer(self, requests: Sequence[InferenceRequest], emit: Emit) -> None:
        """Run a batch of one kind."""
        kind = requests[0].kind
        try:
            if kind not in self.kinds:
                for index in range(len(requests)):
                    emit(index, UnsupportedKind(f"model {self.spec.name!r} does not serve {kind} requests"))
            elif kind in GENERATING:
                eos = frozenset(self.conversion.eos)
                generate(requests, self.codec, OnnxDecoding(self), eos, self.conversion.pad, emit)
            else:
                embed(requests, self.codec, self.spec, self.conversion.pad, self.encode, emit)
        except RuntimeError as error:  # ONNX Runtime's own errors derive from it
            text = first_line(error)
            if "Failed to allocate memory" in text or "out of memory" in text.lower():
                raise EngineOutOfMemory(text) from error
            raise EngineError(f"onnxruntime: {text}") from error

    def encode(self, ids: Tokens, mask: Tokens) -> Vectors:
        """Token vectors of the last layer."""
        feeds = {"ids": ids, "bias": padding_bias(mask), "place": positions(mask)}
        vectors: Vectors = self.run({name: self.value(np.ascontiguousarray(array)) for name, array in feeds.items()})[
            0
        ].numpy()
        return vectors

    def warmup(self) -> None:
        """Run two tokens once."""
        ids = np.full((1, 2), self.conversion.pad, dtype=np.int64)
        mask = np.ones_like(ids)
        if self.conversion.decoder:
            OnnxDecoding(self).prefill(ids, mask)
        else:
            self.encode(ids, mask)

    def close(self) -> None:
        """Let the session go."""
        del self._session


class OnnxEngine(Engine):
    """Loads converted models, converting them where that was not done before."""

    name = EngineName.ONNX

    @classmethod
    def availability(cls, settings: Settings) -> Availability:
        """Whether ONNX Runtime and transformers (for tokenizers) are installed."""
        missing = [package for package in ("onnxruntime", "transformers") if find_spec(package) is None]
        if missing:
            return Availability(
                False,
                f"{' and '.join(missing)} not installed",
                'pip install "muai-fleet[onnx]" (GPU: "muai-fleet[onnx-gpu]")',
            )
        return Availability(True)

    def load(self, spec: ModelSpec) -> OnnxModel:
        """Convert if need be, validate, and open a session on the first providers that are installed."""
        require_path(spec)
        folder, conversion = converted(spec, self.settings)
        return OnnxModel(spec, open_session(folder / GRAPH, self.settings.optimization.onnx, spec), folder, conversion)


def open_session(graph: Path, configured: OnnxSettings, spec: ModelSpec) -> Any:
    """A session with the configured providers that are installed, in their order; others are passed over."""
    import onnxruntime

    installed = onnxruntime.get_available_providers()
    providers = [name for name in configured.execution_providers if name in installed]
    if not providers:
        raise EngineLoadError(
            f"none of the execution providers {', '.join(configured.execution_providers)} is installed "
            f"(there are: {', '.join(installed)}); see optimization.onnx.execution_providers"
        )
    passed_over = [name for name in configured.execution_providers if name not in installed]
    if passed_over:
        logger.info("onnx: %s not installed; using %s", ", ".join(passed_over), ", ".join(providers))
    options = onnxruntime.SessionOptions()
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = {
        "none": level.ORT_DISABLE_ALL,
        "basic": level.ORT_ENABLE_BASIC,
        "extended": level.ORT_ENABLE_EXTENDED,
        "all": level.ORT_ENABLE_ALL,
    }[configured.optimization_level]
    options.log_severity_level = 3
    threads = spec.options.get(EngineName.ONNX, {}).get("intra_op_threads", 0)
    options.intra_op_num_threads = int(threads)
    # Threads that spin while they wait take the processor from the other workers of this machine.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(str(graph), options, providers=providers)
    except Exception as error:  # ONNX Runtime has an error class per status, none of them public
        raise EngineLoadError(f"ONNX Runtime cannot open {spec.name!r}: {first_line(error)}") from error
