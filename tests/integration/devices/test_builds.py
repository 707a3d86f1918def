"""Whether an engine's library can use a GPU, without importing it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from shared.contract import EngineName
from workers.devices.builds import built_for_cuda


def package(folder: Path, name: str, files: dict[str, str]) -> None:
    for path, text in {"__init__.py": "raise AssertionError('imported')", **files}.items():
        (folder / name / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / name / path).write_text(text)


@pytest.mark.parametrize(
    ("engine", "name", "files", "expected"),
    [
        (EngineName.PYTORCH, "torch", {"version.py": "cuda: Optional[str] = None\nhip = None\n"}, False),
        (EngineName.PYTORCH, "torch", {"version.py": "cuda: Optional[str] = '12.8'\nhip = None\n"}, True),
        (EngineName.PYTORCH, "torch", {}, True),
        (EngineName.ONNX, "onnxruntime", {"capi/libonnxruntime_providers_shared.so": ""}, False),
        (EngineName.ONNX, "onnxruntime", {"capi/libonnxruntime_providers_cuda.so": ""}, True),
        (EngineName.VLLM, "vllm", {}, True),
    ],
)
def test_a_build_is_told_by_its_files(tmp_path, monkeypatch, engine, name, files, expected) -> None:
    """What cannot be told counts as built for CUDA: a GPU too many is leased rather than one too few."""
    package(tmp_path, name, files)
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))

    assert built_for_cuda(engine) is expected
