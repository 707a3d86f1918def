"""What the benchmarks share: options, a broker, processes that end, processor time, medians."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import redis
import yaml

from shared.embedded import EmbeddedBroker

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 120.0
STOP_SECONDS = 30.0


def parsed(parser: argparse.ArgumentParser, **short: Any) -> argparse.Namespace:
    """The options of a benchmark. ``--short`` puts these values in the place of defaults.

    The short form shows in seconds that the benchmark runs. Its figures say nothing.
    """
    parser.add_argument("--short", action="store_true", help="a few seconds of it; its figures say nothing")
    if parser.parse_args().short:
        parser.set_defaults(**short)
    return parser.parse_args()


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
    command = [sys.executable, "-m", *arguments]
    with (
        log.open("wb") as out,
        ending(command, env={**os.environ, **environ}, stdin=subprocess.DEVNULL, stdout=out, stderr=out) as process,
    ):
        yield psutil.Process(process.pid)


@contextmanager
def ending(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """A process that leads a group of its own. It is told to stop at the end, and what is left of its group is killed.

    An engine's library starts processes that outlive the one that started them.
    """
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **options)
    try:
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
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
