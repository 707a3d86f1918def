"""Programs that a test runs to their end, and whatever they have started."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Sequence
from contextlib import suppress

import psutil

from tests.support.fleet import ROOT

_MARK = "STARTED_BY_TEST"


def environment(**changes: str) -> dict[str, str]:
    """The environment of this process without a fleet in it, marked: what a program starts can be found again."""
    kept = {k: v for k, v in os.environ.items() if k not in ("REDIS_URL", "MODEL") and not k.startswith("MUAI_")}
    return {**kept, _MARK: str(uuid.uuid4()), **changes}


def run_module(arguments: Sequence[str], environ: dict[str, str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Run ``python -m`` with these arguments."""
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=timeout,
        check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def left_of(environ: dict[str, str]) -> list[str]:
    """The commands that still run with this environment's mark."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(_MARK) == environ[_MARK]:
                found.append(" ".join(process.cmdline()))
    return found
