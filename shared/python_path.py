"""Where processes of this program that another of its processes starts find it."""

from __future__ import annotations

import os
from pathlib import Path

_ROOT = str(Path(__file__).resolve().parents[1])


def python_path() -> str:
    """The ``PYTHONPATH`` with which they find it, wherever it was started from."""
    return os.pathsep.join([_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])
