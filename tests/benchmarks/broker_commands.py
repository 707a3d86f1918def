"""How many commands the broker runs for a message, those inside scripts among them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import redis

from producer import Client
from tests.benchmarks.harness import celery_worker, wait_for

QUIET_SECONDS = 3.0
PAUSE_SECONDS = 0.01


def commands_per_message(connection: redis.Redis, one: Callable[[], object], count: int) -> float:
    """What the broker runs for each of ``count`` lone messages, less what it runs while none comes."""
    idle, seconds = _run(connection, lambda: time.sleep(QUIET_SECONDS))

    def messages() -> None:
        for _ in range(count):
            time.sleep(random.uniform(0, PAUSE_SECONDS))
            one()

    busy, took = _run(connection, messages)
    return (busy - idle / seconds * took) / count


def _run(connection: redis.Redis, what: Callable[[], None]) -> tuple[int, float]:
    """The commands that were run meanwhile, and the seconds that it took."""
    before, started = _commands(connection), time.perf_counter()
    what()
    return _commands(connection) - before, time.perf_counter() - started


def _commands(connection: redis.Redis) -> int:
    return int(connection.info("stats")["total_commands_processed"])


@contextmanager
def more_workers(count: int, environ: Mapping[str, str], folder: Path, client: Client) -> Iterator[None]:
    """So many more workers on the fake engine's queue, all announced."""
    with ExitStack() as stack:
        wanted = len(client.fleet()) + count
        for number in range(count):
            arguments = ["-A", "workers", "worker", "-Q", "fake", "-n", f"more{number}@%h"]
            stack.enter_context(celery_worker(arguments, dict(environ), folder / f"more{number}.log"))
        wait_for(lambda: sum(worker.ready for worker in client.fleet()) == wanted, "the other workers are not there")
        yield
