"""A fleet as its users run it: a configuration on a broker, a client, and ``celery worker`` processes."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from producer import Client
from shared.registry import WorkerInfo
from shared.settings import Settings
from shared.settings_loader import load_settings
from tests.support.forked import Forked, be_worker
from tests.support.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 170.0
STOP_SECONDS = 40.0


@dataclass
class FleetUnderTest:
    """A configuration on a broker, and the worker processes that run with it."""

    url: str
    folder: Path
    config: Path
    processes: list[subprocess.Popen[bytes] | Forked] = field(default_factory=list)
    stack: ExitStack = field(default_factory=ExitStack)
    _client: Client | None = None

    @property
    def settings(self) -> Settings:
        """The settings that workers and client share."""
        return load_settings(self.config, {"REDIS_URL": self.url})

    @property
    def client(self) -> Client:
        """A client of this fleet."""
        if self._client is None:
            self._client = self.stack.enter_context(Client(settings=self.settings))
        return self._client

    @property
    def environ(self) -> dict[str, str]:
        """The environment of this fleet's processes."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MUAI_")}
        return {**kept, "REDIS_URL": self.url, "MUAI_CONFIG": str(self.config), "OMP_NUM_THREADS": "1"}

    def start_worker(
        self, queues: str = "fake", *, wait: bool = True, environ: dict[str, str] | None = None, level: str = "info"
    ) -> subprocess.Popen[bytes] | Forked:
        """Start ``celery -A workers worker -Q <queues>`` and wait until it lives.

        It is forked from a process that has imported the program, unless it is to import something else.
        """
        number = len(self.processes)
        log = self.folder / f"worker-{number}.log"
        log.touch()
        arguments = ["-Q", queues, "-l", level, "-n", f"w{number}@%h"]
        whole = {**self.environ, **(environ or {})}
        process: subprocess.Popen[bytes] | Forked
        if "PYTHONPATH" in (environ or {}):
            with log.open("wb") as out:
                process = subprocess.Popen(
                    [sys.executable, "-m", "celery", "-A", "workers", "worker", *arguments], cwd=ROOT, env=whole,
                    stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                )  # fmt: skip
        else:
            process = Forked(be_worker, arguments, whole, log)
        self.processes.append(process)
        if wait:
            self.wait_live(process)
        return process

    def wait_live(self, process: subprocess.Popen[bytes] | Forked, seconds: float = START_SECONDS) -> WorkerInfo:
        """Wait until the process is in the registry, and takes requests."""

        def live() -> WorkerInfo | None:
            if process.poll() is not None:
                raise AssertionError(f"the worker ended with {process.returncode}:\n{self.log(process)[-3000:]}")
            return next((worker for worker in self.client.fleet() if worker.pid == process.pid and worker.ready), None)

        return eventually(live, seconds, "the worker's announcement")

    def log(self, process: subprocess.Popen[bytes] | Forked) -> str:
        """What a worker has logged."""
        return (self.folder / f"worker-{self.processes.index(process)}.log").read_text(errors="replace")

    def stop(self) -> None:
        """Stop everything."""
        self.stack.close()
        for process in self.processes:
            if process.poll() is None:
                process.terminate()
        for process in self.processes:
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


FAKE = {
    "optimization": {"engine_preference": ["fake"]},
    "models": {"catalog": {"echo": {"path": "fake", "kinds": ["generate", "chat", "embed"], "engines": ["fake"]}}},
}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes`` over it, section by section."""
    out = dict(base)
    for key, value in changes.items():
        out[key] = merged(base.get(key, {}), value) if isinstance(value, dict) else value
    return out
