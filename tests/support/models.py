"""Models that a run of the tests makes once: whichever of its processes needs one first makes it for all of them."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from shared.settings import ModelSpec, OnnxSettings, Settings


@contextmanager
def converting_here() -> Iterator[None]:
    """Models are converted by this process, where that takes half as long as by one of its own: much is loaded."""
    from workers.engines.onnx import conversion
    from workers.engines.onnx.export import convert

    def here(spec: ModelSpec, settings: OnnxSettings, folder: Path) -> None:
        convert(spec, settings, folder).write(folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "convert_by_process", here)
        yield


class Models:
    """Tiny models by name, what they are converted to, and what transformers answers for them.

    Args:
        folder: one that all processes of the run share. A lock in it lets one of them make what the others wait for.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.cache = folder / "cache"
        self._folder = folder

    def path(self, name: str) -> Path:
        """The folder of a model of ``tests.support.tiny_models.MAKERS``."""
        from tests.support.tiny_models import MAKERS

        path = self._folder / name
        with self.making(name):
            if not path.exists():
                MAKERS[name](path.with_suffix(".making")).rename(path)
        return path

    def answers(self, ask: Callable[..., Any], path: Path, *arguments: Any) -> Any:
        """``ask(path, *arguments)``, a reference of ``tests.support.tiny_models``, as lists; asked once in a run."""
        question = json.dumps([ask.__name__, str(path), *arguments]).encode()
        kept = self._folder / f"{hashlib.sha256(question).hexdigest()}.json"
        with self.making(kept.stem):
            if not kept.exists():
                kept.write_text(json.dumps(ask(path, *arguments), default=lambda array: array.tolist()))
        return json.loads(kept.read_text())

    def settings(self, **sections: Any) -> Settings:
        """Settings whose conversions are the run's."""
        return Settings.model_validate({"models": {"cache_dir": str(self.cache)}, **sections})

    def convert(self, spec: ModelSpec) -> None:
        """Convert a model to ONNX, unless a process of the run has done it."""
        from workers.engines.onnx.conversion import converted
        from workers.engines.onnx.files import folder_of

        settings = self.settings()
        with self.making(folder_of(spec, settings).name), converting_here():
            converted(spec, settings)

    @contextmanager
    def making(self, name: str) -> Iterator[None]:
        """Only one process of the run is in this block for a name."""
        with (self._folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
