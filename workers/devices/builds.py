"""Whether an engine's library, as it is installed here, can use a GPU at all. Nothing of it is imported."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from shared.contract import EngineName

_TORCH_WITHOUT_CUDA = re.compile(r"^cuda\b[^=\n]*=\s*None\s*$", re.MULTILINE)


def built_for_cuda(engine: EngineName) -> bool:
    """``False`` where the engine's library is certainly built for the CPU only, or is not here.

    Most machines have such a build of ONNX Runtime although the options name CUDA, and fall back to the CPU: their
    workers must not keep GPUs from those that use them.
    """
    match engine:
        case EngineName.ONNX:
            folder = _folder("onnxruntime")
            return folder is not None and any((folder / "capi").glob("*providers_cuda*"))
        case EngineName.PYTORCH:
            folder = _folder("torch")
            return folder is not None and torch_has_cuda(folder)
        case _:
            return True


def torch_has_cuda(folder: Path) -> bool:
    """Whether the PyTorch in ``folder`` is built with CUDA, as far as its version file says."""
    try:
        return _TORCH_WITHOUT_CUDA.search((folder / "version.py").read_text(encoding="utf-8")) is None
    except OSError:
        return True


def _folder(module: str) -> Path | None:
    spec = find_spec(module)
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None
