"""What the benchmarks share: a broker, worker processes, processor time, medians."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import psutil
import redis
import yaml

from shared.embedded import EmbeddedBroker

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 120.0


@contextmanager
def scratch_broker() -> Iterator[tuple[Path, str]]:
    """A folder and an embedded broker in it."""
    with tempfile.TemporaryDirectory(prefix="muai-bench-") as folder, EmbeddedBroker(Path(folder) / "broker") as broker:
        yield Path(folder), broker.url


def write_yaml(path: Path, data: dict[str, Any]) -> Path:
    """A configuration file."""
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


def celery_worker(
    arguments: Sequence[str], environ: dict[str, str], log: Path
) -> AbstractContextManager[psutil.Process]:
    """A Celery worker process, stopped at the end."""
    return module_process(["celery", *arguments], environ, log)


@contextmanager
def module_process(arguments: Sequence[str], environ: dict[str, str], log: Path) -> Iterator[psutil.Process]:
    """``python -m`` with these arguments in a process of its own, stopped at the end."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments], cwd=ROOT, env={**os.environ, **environ},
            stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(condition: Any, what: str) -> None:
    """Wait until ``condition()`` is true."""
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} after {START_SECONDS:.0f} s")
        time.sleep(0.05)


def cpu_seconds(process: psutil.Process) -> float:
    """Processor time of a process and its children."""
    total = 0.0
    for member in [process, *process.children(recursive=True)]:
        times = member.cpu_times()
        total += times.user + times.system
    return total


def broker_process(url: str) -> psutil.Process:
    """The process of a broker on this machine."""
    with redis.Redis.from_url(url) as client:
        return psutil.Process(client.info("server")["process_id"])


def median(values: Sequence[float]) -> float:
    """The middle value."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
