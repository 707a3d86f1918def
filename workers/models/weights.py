"""What the files of a model are, told without reading all of large ones: workers compare what they serve."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from shared.registry import Weights

SAMPLES, SAMPLE_BYTES = 64, 1 << 14
"""How many pieces of a large file are read, and how many bytes of each: its first, its last, and some between."""


def weights_of(path: str) -> Weights | None:
    """The digest of a model's files (names, sizes, pieces of the contents), and when one of them was changed last.

    ``None`` where they are not in a folder of their own. Hidden files and texts for people do not count.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return None
    digest, changed = hashlib.sha256(), 0.0
    for file in sorted(item for item in folder.rglob("*") if item.is_file()):
        name = file.relative_to(folder)
        if file.suffix == ".md" or any(part.startswith(".") for part in name.parts):
            continue
        with file.open("rb") as content:
            status = os.fstat(content.fileno())
            digest.update(f"{name}:{status.st_size}".encode())
            changed = max(changed, status.st_mtime)
            for place in _places(status.st_size):
                content.seek(place)
                digest.update(content.read(SAMPLE_BYTES))
    return Weights(digest=digest.hexdigest()[:16], changed=changed) if changed else None


def _places(size: int) -> list[int]:
    """Where the pieces of a file of this size begin; they cover a small one."""
    last = max(0, size - SAMPLE_BYTES)
    if size <= SAMPLES * SAMPLE_BYTES:
        return list(range(0, max(1, size), SAMPLE_BYTES))
    return [last * piece // (SAMPLES - 1) for piece in range(SAMPLES)]
