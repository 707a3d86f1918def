"""Loaded models that the tests of a file share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shared.settings import ModelSpec
from tests.support.models import Models, converting_here
from workers.engines import engine_class
from workers.engines.base import LoadedModel


@pytest.fixture(autouse=True)
def _converting_here(request: pytest.FixtureRequest) -> Iterator[None]:
    """Models are converted by this process, except in the tests of the process that does it for a worker."""
    if request.node.get_closest_marker("converts_by_process"):
        yield
        return
    with converting_here():
        yield


@pytest.fixture(scope="module")
def load(models: Models) -> Iterator[Callable[..., LoadedModel]]:
    """Loads a model with an engine, once: ``load("onnx", "llama")``; one of another path is named by ``path``."""
    kept: dict[tuple[str, str], LoadedModel] = {}

    def load(engine: str, name: str, path: Path | None = None, **spec: object) -> LoadedModel:
        if (engine, name) not in kept:
            declared = ModelSpec.model_validate(
                {
                    "name": name, "path": str(path or models.path(name)),
                    "options": {"onnx": {"intra_op_threads": 1}}, **spec,
                }
            )  # fmt: skip
            if engine == "onnx":
                models.convert(declared)
            kept[engine, name] = engine_class(engine)(models.settings()).load(declared)  # type: ignore[arg-type]
            kept[engine, name].warmup()
        return kept[engine, name]

    yield load
    for model in kept.values():
        model.close()
