"""Models that are loaded slowly, or that do not fit beside the others."""

from __future__ import annotations

import gc
import logging
import weakref
from typing import Any

import pytest

from shared.errors import EngineLoadError
from shared.settings import ModelSpec, Settings
from tests.support.waiting import eventually
from workers.engines.base import LoadedModel
from workers.engines.fake import FakeEngine
from workers.models.loading import is_out_of_memory, said
from workers.models.manager import ModelManager

SETTINGS = Settings.model_validate({"models": {"catalog": {name: {"path": "fake"} for name in ("a", "b", "large")}}})


class Weights:
    """Memory that somebody may hold."""


class FullEngine(FakeEngine):
    """Has memory for the large model alone, or not even for that. ``begun`` are the weights of loads that failed."""

    def __init__(self, settings: Settings, fits_alone: bool) -> None:
        super().__init__(settings)
        self.fits_alone = fits_alone
        self.models: ModelManager
        self.begun: list[weakref.ref[Weights]] = []

    def load(self, spec: ModelSpec) -> LoadedModel:
        weights = Weights()
        others = [name for name in ("a", "b") if self.models.find(name) is not None]
        if spec.name == "large" and (others or not self.fits_alone):
            self.begun.append(weakref.ref(weights))
            try:
                raise MemoryError("cannot allocate 70 GB")
            except MemoryError as error:
                raise EngineLoadError("no place for it") from error
        return super().load(spec)


def full(fits_alone: bool) -> tuple[ModelManager, FullEngine, list[tuple[str, str]]]:
    """A manager of such an engine, with two models loaded, and what happens to its models from now on."""
    engine = FullEngine(SETTINGS, fits_alone)
    models = engine.models = ModelManager(engine, SETTINGS)
    models.get("a"), models.get("b")
    happened: list[tuple[str, str]] = []
    models.on_event = lambda event: happened.append((event.action, event.model))
    return models, engine, happened


def test_a_model_that_does_not_fit_is_loaded_without_the_others() -> None:
    models, engine, happened = full(fits_alone=True)

    models.get("large")

    assert happened == [("unload", "a"), ("unload", "b"), ("load", "large")]
    gc.collect()
    assert [weights() for weights in engine.begun] == [None]


def test_what_a_failed_load_had_taken_is_free_while_the_model_rests() -> None:
    """Its error is kept, to be told to others; the half of the model that its frames hold is not."""
    models, engine, _ = full(fits_alone=False)

    with pytest.raises(EngineLoadError, match="no place for it"):
        models.get("large")

    gc.collect()
    assert [weights() for weights in engine.begun] == [None, None]
    assert "large" in models.failures()


@pytest.mark.parametrize(
    ("error", "expected"),
    [(MemoryError(), True), (type("OutOfMemoryError", (RuntimeError,), {})("CUDA"), True), (OSError("no file"), False)],
)
def test_what_counts_as_want_of_memory(error: Exception, expected: bool) -> None:
    """What libraries raise for it, also where another error came of it."""
    wrapped = EngineLoadError("cannot load")
    wrapped.__cause__ = error

    assert is_out_of_memory(wrapped) is expected


def test_a_slow_load_is_said_now_and_then(caplog: Any) -> None:
    with caplog.at_level(logging.INFO), said("fake", "slow", every=0.01):
        eventually(lambda: len(caplog.messages) >= 2, 10, "two lines")

    assert caplog.messages[0].startswith("fake: slow is being loaded, for ")
