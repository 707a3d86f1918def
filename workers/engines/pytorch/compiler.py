"""torch.compile for models: kept by id, its mode by load, and the model as it is wherever compiling fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch

from shared.settings import PyTorchSettings
from workers.engines.common.text import first_line

logger = logging.getLogger(__name__)

Mode = Literal["default", "reduce-overhead", "max-autotune"]
Forward = Callable[..., Any]


class CompiledModel:
    """A model's forward pass, compiled; from the first failure of the compiled one on, the model as it is.

    torch compiles on the first run with a shape, so that is where most failures show. ``failed`` says why.
    """

    def __init__(self, model: Any, model_id: str, mode: Mode, compiled: Forward | None, failed: str | None) -> None:
        self.model = model
        self.mode = mode
        self.failed = failed
        self._id = model_id
        self._compiled = compiled

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Run the forward pass."""
        if self._compiled is None:
            return self.model(*arguments, **named)
        before = _cached(named)
        try:
            return self._compiled(*arguments, **named)
        except torch.OutOfMemoryError:
            raise  # there is no more memory for the model as it is either: the batch must become smaller
        except Exception as error:  # compiling fails with whatever a pass, a backend or the C++ compiler raises
            if _cached(named) != before:
                raise  # a part has run and has written into the cache: another run would read it twice
            # Run as it is, an error of the inputs shows again, and as itself: then compiling was not at fault.
            result = self.model(*arguments, **named)
            self._compiled = None
            self.failed = _told(self._id, self.mode, error)
            return result


class ModelCompiler:
    """Compiles models and keeps what came of it by the model's id. ``backend`` is torch's own unless a test says."""

    def __init__(self, settings: PyTorchSettings, backend: str | Callable[..., Any] = "inductor") -> None:
        self._settings = settings
        self._backend = backend
        self._kept: dict[str, CompiledModel] = {}

    def mode_for(self, load: float) -> Mode:
        """The mode for a share of busy time from 0 to 1: the busier, the more it pays to search for fast kernels."""
        if load > self._settings.compile_load_high:
            return "max-autotune"
        if load < self._settings.compile_load_low:
            return "default"
        return self._settings.compile_mode

    def compile_model(self, model: Any, model_id: str, load: float | None = None) -> CompiledModel:
        """Compile a model's forward pass and keep it; without a ``load``, in the configured mode. Never raises."""
        mode = self._settings.compile_mode if load is None else self.mode_for(load)
        compiled: Forward | None = None
        failed: str | None = None
        try:
            compiled = self._compile(model, mode)
        except Exception as error:  # noqa: BLE001  # likewise; what was raised is logged and kept
            failed = _told(model_id, mode, error)
        self._kept[model_id] = CompiledModel(model, model_id, mode, compiled, failed)
        return self._kept[model_id]

    def get_compiled_model(self, model_id: str) -> CompiledModel | None:
        """What was compiled under this id."""
        return self._kept.get(model_id)

    def recompile(self, model_id: str, load: float | None = None) -> CompiledModel:
        """Compile again, for another load or after a failure; raise :class:`KeyError` for an id that is not kept."""
        return self.compile_model(self._kept[model_id].model, model_id, load)

    def forget(self, model_id: str) -> None:
        """Let one go."""
        self._kept.pop(model_id, None)

    def close(self) -> None:
        """Let all go."""
        self._kept.clear()

    def _compile(self, model: Any, mode: Mode) -> Forward:
        compiled: Forward = torch.compile(
            model,
            backend=self._backend,
            dynamic=self._settings.compile_dynamic,
            mode=mode if self._backend == "inductor" else None,  # another backend knows no modes
        )
        return compiled


def _cached(named: Mapping[str, Any]) -> list[int]:
    """How many tokens each layer of the key-value cache among the arguments holds."""
    cache = named.get("past_key_values")
    return [] if cache is None else [cache.get_seq_length(layer) for layer in range(len(cache))]


def _told(model_id: str, mode: str, error: Exception) -> str:
    cause = getattr(error, "inner_exception", error)  # torch wraps what a backend raises
    reason = f"{type(cause).__name__}: {first_line(cause)}"
    logger.warning("pytorch: %s runs uncompiled: torch.compile (%s) failed: %s", model_id, mode, reason)
    return reason
