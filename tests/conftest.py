"""A real broker, real workers. Everything that a test starts is stopped with it."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml

from producer import Client
from shared.embedded import EmbeddedBroker
from shared.registry import WorkerInfo
from shared.settings import Settings
from shared.settings_loader import load_settings

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 170.0
STOP_SECONDS = 40.0
OURS = re.compile(r"(shared|producer|workers)\b")


def eventually(condition: Callable[[], Any], timeout: float = 20.0, what: str = "the condition") -> Any:
    """Wait until ``condition()`` is true and return its value."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come true within {timeout} s; last: {value!r}")
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def _warnings_are_heard() -> Iterator[None]:
    """No test leaves our loggers silent: others, which look for a warning, would fail in its place."""
    yield
    ours = [logging.getLogger(name) for name in sorted(logging.root.manager.loggerDict) if OURS.match(name)]
    silent = [logger.name for logger in ours if not logger.isEnabledFor(logging.WARNING)]
    assert not silent, f"silent from now on: {silent}"


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedBroker]:
    """One embedded broker for the tests of a process."""
    with EmbeddedBroker(tmp_path_factory.mktemp("broker")) as embedded:
        yield embedded


@pytest.fixture
def redis_client(broker: EmbeddedBroker) -> Iterator[redis.Redis]:
    """A client of an empty broker."""
    client = redis.Redis.from_url(broker.url)
    client.flushall()
    yield client
    client.close()


@dataclass
class FleetUnderTest:
    """A configuration on a broker, and the worker processes that run with it."""

    url: str
    folder: Path
    config: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
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
    ) -> subprocess.Popen[bytes]:
        """Start ``celery -A workers worker -Q <queues>`` and wait until it lives."""
        number = len(self.processes)
        log = self.folder / f"worker-{number}.log"
        command = [
            sys.executable,
            "-m",
            "celery",
            "-A",
            "workers",
            "worker",
            "-Q",
            queues,
            "-l",
            level,
            "-n",
            f"w{number}@%h",
        ]
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, cwd=ROOT, env={**self.environ, **(environ or {})}, stdin=subprocess.DEVNULL, stdout=out,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.processes.append(process)
        if wait:
            self.wait_live(process)
        return process

    def wait_live(self, process: subprocess.Popen[bytes], seconds: float = START_SECONDS) -> WorkerInfo:
        """Wait until the process is in the registry."""

        def live() -> WorkerInfo | None:
            if process.poll() is not None:
                raise AssertionError(f"the worker ended with {process.returncode}:\n{self.log(process)[-3000:]}")
            return next((worker for worker in self.client.fleet() if worker.pid == process.pid), None)

        return eventually(live, seconds, "the worker's announcement")

    def log(self, process: subprocess.Popen[bytes]) -> str:
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


@pytest.fixture
def make_fleet(
    broker: EmbeddedBroker, redis_client: redis.Redis, tmp_path: Path
) -> Iterator[Callable[..., FleetUnderTest]]:
    """Makes fleets on an empty broker: ``make_fleet(fleet={"lease_seconds": 2})``; the fake model is declared."""
    made: list[FleetUnderTest] = []

    def make(base: dict[str, Any] | None = None, **changes: Any) -> FleetUnderTest:
        config = tmp_path / f"fleet-{len(made)}.yaml"
        config.write_text(yaml.safe_dump(merged(FAKE if base is None else base, changes)), encoding="utf-8")
        made.append(FleetUnderTest(broker.url, tmp_path, config))
        return made[-1]

    yield make
    for fleet in made:
        fleet.stop()


@pytest.fixture
def fleet(make_fleet: Callable[..., FleetUnderTest]) -> FleetUnderTest:
    """A fleet with one fake-engine worker."""
    made = make_fleet()
    made.start_worker()
    return made
