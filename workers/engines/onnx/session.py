"""Sessions of ONNX Runtime: which execution providers, with which options."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from shared.contract import EngineName
from shared.errors import EngineLoadError
from shared.settings import ModelSpec, OnnxSettings, Settings
from workers.engines.common.text import first_line

logger = logging.getLogger(__name__)

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
OPENVINO = "OpenVINOExecutionProvider"


def provider_options(provider: str, settings: Settings, spec: ModelSpec) -> dict[str, str]:
    """The options of one execution provider. In a model's ``options.onnx``: ``openvino_device`` (CPU, GPU, ...)."""
    if provider == TENSORRT:
        # Building an engine takes minutes: it is kept beside the conversions, like the timings it is built from.
        folder = Path(settings.models.cache_dir).expanduser().resolve() / "onnx" / "tensorrt"
        return {
            "trt_engine_cache_enable": "True",
            "trt_engine_cache_path": str(folder),
            "trt_timing_cache_enable": "True",
            "trt_timing_cache_path": str(folder),
        }
    if provider == OPENVINO:
        # The CPU is there on every machine that OpenVINO runs on; which of its other devices are, only AUTO finds out.
        return {"device_type": str(spec.options.get(EngineName.ONNX, {}).get("openvino_device", "CPU"))}
    if provider == CUDA:
        # Grown by doubling, the arena would take up to twice the cache's size.
        return {"arena_extend_strategy": "kSameAsRequested"}
    return {}


def open_session(graph: Path, settings: Settings, spec: ModelSpec) -> Any:
    """A session on the first configured provider that works here, with those behind it for what it cannot run.

    Providers that are not installed are passed over, and so are those that fail to start; raises
    :class:`EngineLoadError` where none is left, or where the graph is at fault.
    """
    import onnxruntime

    configured = settings.optimization.onnx
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
    options = session_options(configured, spec)
    while True:
        try:
            return _open(graph, options, {name: provider_options(name, settings, spec) for name in providers})
        except Exception as error:  # ONNX Runtime has an error class per status, none of them public
            if len(providers) == 1:
                raise EngineLoadError(
                    f"ONNX Runtime cannot open {spec.name!r} with {providers[0]}: {first_line(error)}"
                ) from error
            logger.warning(
                "onnx: %s does not start for %s and is passed over: %s", providers[0], spec.name, first_line(error)
            )
            providers = providers[1:]


def _open(graph: Path, options: Any, providers: dict[str, dict[str, str]]) -> Any:
    import onnxruntime

    for named in providers.values():
        if "trt_engine_cache_path" in named:
            Path(named["trt_engine_cache_path"]).mkdir(parents=True, exist_ok=True)
    session = onnxruntime.InferenceSession(str(graph), options, providers=list(providers.items()))
    # A provider whose libraries are missing does not always raise: ONNX Runtime may go on with the others.
    running = session.get_providers()
    for name in providers:
        if name not in running:
            logger.warning("onnx: %s is installed but does not start here; running on %s", name, ", ".join(running))
    return session


def session_options(configured: OnnxSettings, spec: ModelSpec) -> Any:
    """How a session runs, whatever the provider. ``options.onnx`` of a model: ``intra_op_threads``, ``spin``."""
    import onnxruntime

    own = spec.options.get(EngineName.ONNX, {})
    options = onnxruntime.SessionOptions()
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = {
        "none": level.ORT_DISABLE_ALL,
        "basic": level.ORT_ENABLE_BASIC,
        "extended": level.ORT_ENABLE_EXTENDED,
        "all": level.ORT_ENABLE_ALL,
    }[configured.optimization_level]
    options.log_severity_level = 3
    options.intra_op_num_threads = int(own.get("intra_op_threads", 0))
    # Threads that spin while they wait take the processor from the other workers of this machine.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if own.get("spin", False) else "0")
    return options
