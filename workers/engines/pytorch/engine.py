"""The PyTorch engine: transformers models, run as they are. Imports torch only where a model is to be loaded."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar

from shared.contract import EngineName, Feature
from shared.settings import ModelSpec, Settings
from workers.engines.base import Availability, Engine
from workers.engines.common.text import require_path

if TYPE_CHECKING:
    from workers.engines.pytorch.model import TorchModel


class PyTorchEngine(Engine):
    """Loads transformers models."""

    name = EngineName.PYTORCH
    features: ClassVar[frozenset[Feature]] = frozenset({Feature.LOGPROBS})

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        from workers.engines.pytorch.compiler import ModelCompiler

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
        from workers.engines.pytorch.model import load_model

        require_path(spec)
        configured = self.settings.optimization.pytorch
        return load_model(spec, configured, self.compiler if configured.compile else None)

    def close(self) -> None:
        """Let compiled models go."""
        self.compiler.close()
