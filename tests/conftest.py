"""A real broker, real workers. Everything that a test starts is stopped with it."""

from __future__ import annotations

import gc
import logging
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from celery.result import AsyncResult

from shared.embedded import EmbeddedBroker
from tests.support.fleet import FAKE, FleetUnderTest, merged
from tests.support.models import Models
from tests.support.slowest import slowest_files

OURS = re.compile(r"(shared|producer|workers)\b")

# Before torch is imported, here and in every process that a test starts: threads of several processes that wait for
# each other on few cores spin, and tiny models become fifteen times slower.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # else every engine core is bound to the same processor

# A shell that runs the tests in the background lets them ignore Ctrl-C, and with them all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say where the time went."""
    if lines := slowest_files(terminalreporter.stats):
        terminalreporter.section("slowest files")
        for line in lines:
            terminalreporter.write_line(line)


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
        gc.collect()  # results that nobody waits for tell the broker so when they go, while it is there
    # Those that are still held would fail at it, at a time when Python 3.11 may be in the middle of something.
    AsyncResult.__del__ = lambda _: None  # type: ignore[method-assign]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The models of this run; under xdist, of all its processes."""
    folder = tmp_path_factory.getbasetemp()
    return Models((folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "models-of-the-run")


@pytest.fixture
def redis_client(broker: EmbeddedBroker) -> Iterator[redis.Redis]:
    """A client of an empty broker."""
    client = redis.Redis.from_url(broker.url)
    client.flushall()
    yield client
    client.close()


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
