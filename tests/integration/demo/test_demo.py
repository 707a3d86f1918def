"""What a newcomer runs: ``make demo`` is ``python -m demo`` after set-up."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import psutil
import pytest

from tests.support.fleet import ROOT

pytestmark = pytest.mark.timeout(900)


def test_the_demo_answers_everything_right_and_leaves_nothing_behind() -> None:
    """On the embedded broker both engines serve, every checkable answer is right, and no process is left."""
    environ = {k: v for k, v in os.environ.items() if k != "REDIS_URL" and not k.startswith("MUAI_") and k != "MODEL"}

    run = subprocess.run(
        [sys.executable, "-m", "demo"], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=880, check=False
    )

    assert run.returncode == 0, run.stdout + run.stderr
    shares = re.findall(r"^(\w+): \d+ of \d+ answers right \((\d+)%\)$", run.stdout, re.MULTILINE)
    assert {task for task, _ in shares} == {"addition", "reversal", "ordering"}
    assert all(int(share) >= 98 for _, share in shares)
    assert run.stdout.count(" is nearest to ") == 6
    assert "not the one a person would pick" not in run.stdout
    assert re.search(r"onnx +│ +189 │ +0", run.stdout)
    assert re.search(r"pytorch +│ +189 │ +0", run.stdout)
    url = re.search(r"broker redis://127\.0\.0\.1:(\d+)", run.stdout)
    assert url
    left = [
        p for p in psutil.process_iter(["cmdline"]) if any(f":{url[1]}" in part for part in p.info["cmdline"] or ())
    ]
    assert left == []
