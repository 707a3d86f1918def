"""What a model's files are, told without reading all of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

SAMPLE_BYTES = 1 << 16


def content_digest(path: str, *parts: str) -> str:
    """16 hex digits that change with a model's files (names, sizes, first and last bytes) and with ``parts``."""
    digest = hashlib.sha256("|".join(parts).encode())
    folder = Path(path).expanduser()
    if not folder.is_dir():
        digest.update(path.encode())
        return digest.hexdigest()[:16]
    for file in sorted(item for item in folder.rglob("*") if item.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)}:{size}".encode())
        with file.open("rb") as content:
            digest.update(content.read(SAMPLE_BYTES))
            content.seek(max(0, size - SAMPLE_BYTES))
            digest.update(content.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def weight_bytes(path: str) -> int:
    """How many bytes of weights are in a model's folder; 0 where it is none."""
    folder = Path(path).expanduser()
    kinds = ("*.safetensors", "*.bin", "*.pt", "*.pth")
    return sum(file.stat().st_size for kind in kinds for file in folder.rglob(kind)) if folder.is_dir() else 0
