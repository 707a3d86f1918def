"""Converts a model to ONNX: exported from PyTorch, and validated against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import EngineLoadError, MissingDependency
from shared.settings import ModelSpec, OnnxSettings
from workers.engines.common.roles import Role, role_of
from workers.engines.common.scoring import Labels
from workers.engines.common.text import TextCodec, first_line, task_prefixes
from workers.engines.onnx.checks import measured
from workers.engines.onnx.files import ENCODER_GRAPH, GRAPH, Conversion
from workers.engines.onnx.model import OnnxModel

if TYPE_CHECKING:
    from workers.engines.pytorch.model import TorchModel

QUANTISED_LEAST_COSINE = 0.95
"""Least cosine similarity of a quantised model's outputs to the original's at which it may serve."""


def convert(spec: ModelSpec, settings: OnnxSettings, folder: Path) -> Conversion:
    """Write the converted model into a folder, validated.

    For a process of its own, as :mod:`workers.engines.onnx.conversion` is: the exporter changes PyTorch for the whole
    process while it works. Raises what :func:`workers.engines.onnx.conversion.converted` does.
    """
    try:
        import onnx  # noqa: F401  # the exporter needs both, and says so late and at length
        import onnxscript  # noqa: F401
        import torch
    except ImportError as error:
        raise MissingDependency(
            f'converting {spec.name!r} to ONNX needs {error.name}: pip install "muai-fleet[onnx-export]"'
        ) from error
    from workers.engines.onnx import graphs

    quantise = settings.enable_quantization
    original = _original(spec)
    conversion = _described(original, quantise)
    kinds: dict[Role, dict[str, type[graphs.Graph]]] = {
        Role.DECODER: {GRAPH: graphs.DecoderGraph},
        Role.ENCODER: {GRAPH: graphs.TextGraph},
        Role.CLASSIFIER: {GRAPH: graphs.TextGraph},
        Role.SEQ2SEQ: {ENCODER_GRAPH: graphs.ReadingGraph, GRAPH: graphs.WritingGraph},
    }
    graphs.quieten()
    try:
        with torch.inference_mode():
            for name, graph in kinds[conversion.role].items():
                graph(original.model, conversion).export(folder / name)
                if quantise:
                    _quantise(folder, name)
    except Exception as error:  # the exporter raises whatever its passes raise
        raise EngineLoadError(
            f"cannot convert {spec.name!r} to ONNX: {type(error).__name__}: {first_line(error)}"
        ) from error
    return _validated(original, conversion, folder, settings)


def _original(spec: ModelSpec) -> TorchModel:
    """The model as the PyTorch engine serves it, in float32 on the CPU."""
    import torch

    from workers.engines.common import weights
    from workers.engines.pytorch.model import TorchModel

    model = weights.load_weights(spec, torch.float32)
    codec = TextCodec(spec, weights.context_of(spec, model.config, model), task_prefixes(model.config))
    return TorchModel(spec, model, codec, torch.device("cpu"))


def _described(original: TorchModel, quantise: bool) -> Conversion:
    """What is known of the conversion before it is made."""
    import torch

    from workers.engines.common import weights
    from workers.engines.onnx import graphs

    spec, model = original.spec, original.model
    role = role_of(spec)
    start: tuple[int, ...] = ()
    forbidden: tuple[int, ...] = ()
    if role is Role.SEQ2SEQ:
        writing = weights.writing_of(spec, model)
        start, forbidden = writing.start, writing.forbidden
    layers, heads, size = 0, 0, 0
    if role in (Role.DECODER, Role.SEQ2SEQ):
        with torch.inference_mode():
            layers, heads, size = graphs.cache_shape(model, start)
    return Conversion(
        role=role,
        layers=layers,
        kv_heads=heads,
        head_size=size,
        max_context=_context(original.max_context, model.config),
        eos=tuple(sorted(original.eos)),
        pad=original.pad,
        first_position=weights.first_position(model),
        packs=role is Role.ENCODER,
        start=start,
        forbidden=forbidden,
        labels=Labels.of(model.config, spec) if role is Role.CLASSIFIER else None,
        prefixes=tuple(task_prefixes(model.config).items()),
        quantised=quantise,
    )


def _validated(original: TorchModel, conversion: Conversion, folder: Path, settings: OnnxSettings) -> Conversion:
    """The conversion with what it costs; raise :class:`EngineLoadError` where that is more than is allowed.

    An encoder is first tried with several texts in a row. Where positions are not all that ties a token to its text
    (relative attention, convolutions) that deviates, and each text gets a row of its own.
    """
    spec = original.spec
    configured = settings.validation_tolerance
    limit = 1 - QUANTISED_LEAST_COSINE if conversion.quantised else configured
    for packs in (True, False) if conversion.packs else (False,):
        tried = replace(conversion, packs=packs)
        cost = measured(OnnxModel(spec, folder, tried, _plain_session), original)
        tried = replace(tried, cost=cost)
        away = tried.difference
        if away <= limit:
            return tried
    raise EngineLoadError(
        f"the ONNX conversion of {spec.name!r} deviates from the original by {away:.3g}; at most {limit:.3g} may be "
        + ("(quantised)" if conversion.quantised else "(optimization.onnx.validation_tolerance)")
    )


def _plain_session(graph: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def _quantise(folder: Path, name: str) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    plain = folder / f"plain-{name}"
    for file in folder.glob(f"{name}*"):
        file.rename(folder / file.name.replace(name, plain.name))
    # A scale for each output channel, not one for the whole matrix: it costs nothing and loses half as much.
    quantize_dynamic(str(plain), str(folder / name), weight_type=QuantType.QInt8, per_channel=True)
    for file in folder.glob(f"{plain.name}*"):
        file.unlink()


def _context(limit: int | None, config: Any) -> int | None:
    """The bias hides nothing beyond a sliding window, so such a model is served within its window only."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    limits: Sequence[int] = [value for value in (limit, window) if value]
    return min(limits) if limits else None
