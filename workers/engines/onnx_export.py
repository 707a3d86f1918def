"""Conversion to ONNX, once per model and content: exported from the PyTorch model, validated against it, kept on disk.

The exporter is torch's own (``torch.onnx.export(dynamo=True)``). Masks are made outside of the graph and come in as an
additive bias of shape (rows, 1, queries, keys): that leaves nothing data-dependent to trace, and left padding, right
padding and cached keys all work the same for any architecture whose attention takes a bias.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import EngineLoadError, MissingDependency
from shared.settings import ModelSpec, Settings
from workers.engines.text import TextCodec, first_line

logger = logging.getLogger(__name__)

GRAPH = "model.onnx"
META = "conversion.json"
LAYOUT_VERSION = 1
OPSET = 18
SAMPLE_BYTES = 1 << 20
QUANTISED_LEAST_COSINE = 0.95
"""Least cosine similarity of a quantised model's outputs to the original's at which it may serve."""

NEGATIVE = float(np.finfo(np.float32).min)


@dataclass(frozen=True, slots=True)
class Conversion:
    """A converted model on disk. ``difference`` is the largest deviation from the original that was measured."""

    decoder: bool
    layers: int
    kv_heads: int
    head_size: int
    max_context: int | None
    eos: tuple[int, ...]
    pad: int
    quantised: bool
    difference: float

    @property
    def past_names(self) -> list[str]:
        """The inputs that hold the key-value cache."""
        return [f"past.{layer}.{part}" for layer in range(self.layers) for part in ("key", "value")]

    @property
    def present_names(self) -> list[str]:
        """The outputs that hold it, in the same order."""
        return [f"present.{layer}.{part}" for layer in range(self.layers) for part in ("key", "value")]


def converted(spec: ModelSpec, settings: Settings) -> tuple[Path, Conversion]:
    """The folder of the converted model, converted now if it was not before.

    Raises :class:`EngineLoadError` where the conversion fails or deviates from the original, and
    :class:`MissingDependency` where what it needs is not installed.
    """
    quantise = settings.optimization.onnx.enable_quantization
    folder = Path(settings.models.cache_dir).expanduser() / "onnx" / f"{_safe(spec.name)}-{fingerprint(spec, quantise)}"
    if (folder / META).is_file():
        data = json.loads((folder / META).read_text(encoding="utf-8"))
        return folder, Conversion(**{**data, "eos": tuple(data["eos"])})
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
    try:
        conversion = _convert(spec, settings, scratch, quantise)
        (scratch / META).write_text(json.dumps(asdict(conversion), indent=1), encoding="utf-8")
        try:
            scratch.rename(folder)
        except OSError:
            if not (folder / META).is_file():  # otherwise another worker was faster, with the same result
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    logger.info("converted %s to ONNX: largest difference %.2g", spec.name, conversion.difference)
    return folder, conversion


def fingerprint(spec: ModelSpec, quantise: bool) -> str:
    """Changes with the model's files, the options that shape the graph, and the libraries that write it."""
    digest = hashlib.sha256()
    parts = [str(LAYOUT_VERSION), str(quantise), str(spec.max_length), ",".join(sorted(spec.kinds))]
    parts += [f"{package}={version(package)}" for package in ("transformers", "onnxruntime") if _installed(package)]
    digest.update("|".join(parts).encode())
    path = Path(spec.path).expanduser()
    if path.is_dir():
        for file in sorted(item for item in path.rglob("*") if item.is_file()):
            size = file.stat().st_size
            digest.update(f"{file.relative_to(path)}:{size}".encode())
            with file.open("rb") as content:
                digest.update(content.read(SAMPLE_BYTES))
                content.seek(max(0, size - SAMPLE_BYTES))
                digest.update(content.read(SAMPLE_BYTES))
    else:
        digest.update(spec.path.encode())
    return digest.hexdigest()[:16]


# --- masks --------------------------------------------------------------------------------------------------------


def causal_bias(mask: NDArray[np.int64], queries: int) -> NDArray[np.float32]:
    """The bias for the last ``queries`` tokens of rows with this mask (rows, keys): no padding, nothing ahead."""
    keys = mask.shape[1]
    ahead = np.arange(keys)[None, :] > (np.arange(queries) + keys - queries)[:, None]
    hidden = ahead[None, None] | (mask == 0)[:, None, None, :]
    return np.where(hidden, np.float32(NEGATIVE), np.float32(0.0))


def padding_bias(mask: NDArray[np.int64]) -> NDArray[np.float32]:
    """The bias for an encoder: no padding."""
    rows, keys = mask.shape
    bias = np.where((mask == 0)[:, None, None, :], np.float32(NEGATIVE), np.float32(0.0))
    return np.ascontiguousarray(np.broadcast_to(bias, (rows, 1, keys, keys)))


# --- conversion ---------------------------------------------------------------------------------------------------


def _convert(spec: ModelSpec, settings: Settings, folder: Path, quantise: bool) -> Conversion:
    try:
        import onnx  # noqa: F401  # the exporter needs both, and says so late and at length
        import onnxscript  # noqa: F401
        import torch
    except ImportError as error:
        raise MissingDependency(
            f'converting {spec.name!r} to ONNX needs {error.name}: pip install "muai-fleet[onnx-export]"'
        ) from error
    from workers.engines import pytorch

    model = pytorch.load_weights(spec, torch.float32)
    codec = TextCodec(spec, pytorch.context_of(spec, model.config))
    decoder = bool(pytorch.GENERATING & set(spec.kinds))
    try:
        with _quiet(), torch.inference_mode():
            graph = _Graph(model, decoder)
            graph.export(folder / GRAPH)
    except Exception as error:  # the exporter raises whatever its passes raise
        raise EngineLoadError(
            f"cannot convert {spec.name!r} to ONNX: {type(error).__name__}: {first_line(error)}"
        ) from error
    if quantise:
        _quantise(folder)
    difference = _validate(graph, folder, settings, quantise, spec.name)
    return Conversion(
        decoder=decoder,
        layers=graph.layers,
        kv_heads=graph.kv_heads,
        head_size=graph.head_size,
        max_context=_context(codec.max_context, model.config),
        eos=tuple(sorted(pytorch.eos_tokens(model.config, getattr(model, "generation_config", None), codec))),
        pad=pytorch.pad_token(model.config, codec),
        quantised=quantise,
        difference=difference,
    )


class _Graph:
    """The model as a function of plain tensors, and the shapes it is exported with."""

    def __init__(self, model: Any, decoder: bool) -> None:
        config = model.config
        self.model = model
        self.decoder = decoder
        self.layers = int(config.num_hidden_layers) if decoder else 0
        heads: Any = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 0)
        self.kv_heads = int(heads) if decoder else 0
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.head_size = int(size) if decoder else 0
        self.vocabulary = int(config.vocab_size)

    def call(self, ids: Any, bias: Any, place: Any, past: Any) -> Any:
        """Scores of the last token and the cache for a decoder; token vectors for an encoder."""
        if not self.decoder:
            return self.model(input_ids=ids, attention_mask=bias, position_ids=place).last_hidden_state, []
        from transformers.cache_utils import DynamicCache

        cache = DynamicCache()
        for layer, (key, value) in enumerate(past):
            cache.update(key, value, layer)
        out = self.model(input_ids=ids, attention_mask=bias, position_ids=place, past_key_values=cache, use_cache=True)
        return out.logits[:, -1], [(layer.keys, layer.values) for layer in out.past_key_values.layers]

    def export(self, path: Path) -> None:
        """Write the graph."""
        import torch

        call = self.call

        class Exported(torch.nn.Module):
            def __init__(self, model: Any) -> None:
                super().__init__()
                self.model = model

            def forward(self, ids: Any, bias: Any, place: Any, past: Any) -> Any:
                return call(ids, bias, place, past)

        free = torch.export.Dim.DYNAMIC
        rows, queries, cached = 2, 3, 5 if self.decoder else 0
        past = [
            tuple(torch.randn(rows, self.kv_heads, cached, self.head_size) for _ in range(2))
            for _ in range(self.layers)
        ]
        arguments = (
            torch.ones(rows, queries, dtype=torch.long),
            torch.zeros(rows, 1, queries, cached + queries),
            torch.arange(cached, cached + queries).repeat(rows, 1),
            past,
        )
        shapes = (
            {0: free, 1: free}, {0: free, 2: free, 3: free}, {0: free, 1: free},
            [({0: free, 2: free}, {0: free, 2: free}) for _ in range(self.layers)],
        )  # fmt: skip
        parts = [f"{layer}.{part}" for layer in range(self.layers) for part in ("key", "value")]
        program = torch.onnx.export(
            Exported(self.model).eval(), arguments, dynamo=True, dynamic_shapes=shapes, opset_version=OPSET,
            verbose=False,
            input_names=["ids", "bias", "place", *(f"past.{part}" for part in parts)],
            output_names=["out", *(f"present.{part}" for part in parts)],
        )  # fmt: skip
        if program is None:
            raise EngineLoadError("the exporter returned nothing")
        program.save(str(path))


def _validate(graph: _Graph, folder: Path, settings: Settings, quantised: bool, name: str) -> float:
    """Compare the converted model with the original: a left padded batch, then a step on its cache.

    Returns the largest deviation relative to the largest output (for a quantised model: one minus the least cosine).
    """
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(str(folder / GRAPH), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(5)
    lengths = (7, 4, 1)
    longest = max(lengths)
    ids = rng.integers(0, graph.vocabulary, (len(lengths), longest))
    mask = np.array([[0] * (longest - length) + [1] * length for length in lengths], dtype=np.int64)
    if not graph.decoder:
        mask = mask[:, ::-1].copy()
    place = np.maximum(mask.cumsum(axis=1) - 1, 0)
    bias = causal_bias(mask, longest) if graph.decoder else padding_bias(mask)
    empty = np.zeros((len(lengths), graph.kv_heads, 0, graph.head_size), dtype=np.float32)
    past: list[NDArray[Any]] = [empty] * (2 * graph.layers)
    step_mask = np.concatenate([mask, np.ones((len(lengths), 1), dtype=np.int64)], axis=1)
    rounds: list[tuple[Any, Any, Any]] = [(ids, bias, place)]
    if graph.decoder:
        rounds.append((ids[:, :1], causal_bias(step_mask, 1), place[:, -1:] + 1))
    worst = 0.0
    for tokens, shown, at in rounds:
        feeds = {"ids": tokens, "bias": shown, "place": at}
        feeds.update(
            zip((f"past.{i}.{part}" for i in range(graph.layers) for part in ("key", "value")), past, strict=True)
        )
        present_inputs = {item.name for item in session.get_inputs()}
        ours = session.run(None, {key: value for key, value in feeds.items() if key in present_inputs})
        pairs = [(torch.from_numpy(past[i]), torch.from_numpy(past[i + 1])) for i in range(0, len(past), 2)]
        with torch.inference_mode():
            theirs, _ = graph.call(torch.from_numpy(tokens), torch.from_numpy(shown), torch.from_numpy(at), pairs)
        expected = theirs.numpy()
        keep = slice(None) if graph.decoder else mask.astype(bool)
        worst = max(worst, _deviation(ours[0][keep], expected[keep], quantised))
        past = list(ours[1:])
    limit = 1 - QUANTISED_LEAST_COSINE if quantised else settings.optimization.onnx.validation_tolerance
    if not worst <= limit:
        raise EngineLoadError(
            f"the ONNX conversion of {name!r} deviates from the original by {worst:.3g}; at most {limit:.3g} may be "
            + ("(quantised)" if quantised else "(optimization.onnx.validation_tolerance)")
        )
    return worst


def _deviation(ours: NDArray[Any], theirs: NDArray[Any], quantised: bool) -> float:
    if not quantised:
        return float(np.abs(ours - theirs).max() / max(1.0, float(np.abs(theirs).max())))
    ours, theirs = ours.reshape(-1, ours.shape[-1]), theirs.reshape(-1, theirs.shape[-1])
    cosine = (ours * theirs).sum(-1) / (np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1) + 1e-12)
    return float(1 - cosine.min())


def _quantise(folder: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    plain = folder / "plain.onnx"
    for file in folder.glob(f"{GRAPH}*"):
        file.rename(folder / file.name.replace(GRAPH, plain.name))
    with _quiet():
        quantize_dynamic(str(plain), str(folder / GRAPH), weight_type=QuantType.QInt8)
    for file in folder.glob(f"{plain.name}*"):
        file.unlink()


def _context(limit: int | None, config: Any) -> int | None:
    """The bias hides nothing beyond a sliding window, so such a model is served within its window only."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    limits: Sequence[int] = [value for value in (limit, window) if value]
    return min(limits) if limits else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn about everything they decide; what matters is whether the outcome validates."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "root")]
    levels = [item.level for item in loggers]
    try:
        for item in loggers:
            item.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for item, level in zip(loggers, levels, strict=True):
            item.setLevel(level)


def _installed(package: str) -> bool:
    try:
        version(package)
    except ModuleNotFoundError:
        return False
    return True


def _safe(name: str) -> str:
    return "".join(char if char.isalnum() or char in "-_." else "-" for char in name) or f"model-{os.getpid()}"
