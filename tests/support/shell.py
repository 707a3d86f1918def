"""``muai`` as the process that a user would start."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from tests.support.fleet import ROOT, FleetUnderTest

TIMEOUT = 60


def start(fleet: FleetUnderTest, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    """Start ``muai`` with this fleet's environment."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen([sys.executable, "-m", "producer.cli", *arguments], cwd=ROOT, env=fleet.environ, **pipes)


def muai(fleet: FleetUnderTest, *arguments: str, stdin: str = "") -> tuple[int, str, str]:
    """Run ``muai``: ``(exit status, output, error output)``."""
    process = start(fleet, *arguments, stdin=subprocess.PIPE)
    out, err = process.communicate(stdin.encode(), timeout=TIMEOUT)
    return process.returncode, out.decode(), err.decode()


def muai_says(fleet: FleetUnderTest, *arguments: str, status: int = 0) -> str:
    """What ``muai`` writes, output and error output together, where it ends with this status."""
    found, out, err = muai(fleet, *arguments)
    assert found == status, err
    return out + err
