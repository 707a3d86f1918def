"""The ONNX Runtime engine: models converted from PyTorch, run by ONNX Runtime."""

from __future__ import annotations

from importlib.util import find_spec
from typing import ClassVar

from shared.contract import EngineName, Feature
from shared.settings import ModelSpec, Settings
from workers.engines.base import Availability, Engine
from workers.engines.common.text import require_path
from workers.engines.onnx.conversion import converted
from workers.engines.onnx.model import OnnxModel
from workers.engines.onnx.session import open_session


class OnnxEngine(Engine):
    """Loads converted models, converting them where that was not done before."""

    name = EngineName.ONNX
    features: ClassVar[frozenset[Feature]] = frozenset({Feature.LOGPROBS})

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
        """Convert if need be, validate, and open sessions on the first providers that work."""
        require_path(spec)
        folder, conversion = converted(spec, self.settings)
        return OnnxModel(spec, folder, conversion, lambda graph: open_session(graph, self.settings, spec))
