"""The engines. Each is imported only where its queue is served: their libraries are heavy."""

from __future__ import annotations

from importlib import import_module
from typing import cast

from shared.contract import EngineName
from shared.errors import ConfigurationError
from workers.engines.base import Engine

_CLASSES: dict[EngineName, str] = {
    EngineName.VLLM: "workers.engines.vllm.engine:VLLMEngine",
    EngineName.DEEPSPEED: "workers.engines.deepspeed.engine:DeepSpeedEngine",
    EngineName.ONNX: "workers.engines.onnx.engine:OnnxEngine",
    EngineName.PYTORCH: "workers.engines.pytorch.engine:PyTorchEngine",
    EngineName.FAKE: "workers.engines.fake:FakeEngine",
}


def engine_class(name: EngineName) -> type[Engine]:
    """The class of an engine; raise :class:`ConfigurationError` where this release has none of that name."""
    try:
        module, _, attribute = _CLASSES[name].partition(":")
    except KeyError:
        known = ", ".join(sorted(_CLASSES))
        raise ConfigurationError(
            f"there is no {name} engine in this release; there are: {known}. Name the queues with -Q"
        ) from None
    return cast("type[Engine]", getattr(import_module(module), attribute))
