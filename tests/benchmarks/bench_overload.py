"""``make bench-overload``: what a flood costs those who did not send it.

One worker that can answer about 600 requests a second. A small tenant sends at a steady rate of a quarter of that,
alone and then beside a tenant that keeps thousands waiting; and low-priority requests wait behind a flood of urgent
ones. Who floods uses a client of its own in a process of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.table import Table

from producer import Client, Handle, InferenceResult
from shared.errors import Overloaded
from shared.settings_loader import load_settings
from tests.benchmarks.harness import celery_worker, median, parsed, scratch_broker, wait_for, write_yaml

BATCH = 16
BATCH_MS = 25.0
SMALL_RATE = 150.0
CONFIG = {
    "optimization": {
        "engine_preference": ["fake"],
        "fake": {"latency_ms": BATCH_MS},
        "batcher": {"max_batch_size": BATCH},
    },
    "models": {"catalog": {"echo": {"path": "fake", "kinds": ["generate"], "engines": ["fake"]}}},
}


def request(tenant: str, priority: str = "normal") -> dict[str, Any]:
    """One request."""
    return {"model": "echo", "inputs": {"prompt": "x" * 200}, "tenant": tenant, "priority": priority}


def flood(environ: dict[str, str], priority: str, depth: int) -> None:
    """Keep the queue as full as it lets one tenant, for ever."""
    with Client(settings=load_settings(environ["MUAI_CONFIG"], environ)) as client:
        forever: Iterator[dict[str, Any]] = iter(lambda: request("flood", priority), None)
        for _ in client.map(forever, window=2 * depth, errors="yield"):
            pass


@contextmanager
def flooding(environ: dict[str, str], client: Client, priority: str, depth: int) -> Iterator[None]:
    """A flood under way."""
    process = multiprocessing.get_context("spawn").Process(target=flood, args=(environ, priority, depth), daemon=True)
    process.start()
    try:
        wait_for(lambda: client.queue_lengths()["fake"] > depth / 2, "the queue is not flooded")
        yield
    finally:
        process.kill()
        process.join()
        wait_for(lambda: client.queue_lengths()["fake"] == 0, "the queue does not empty")


def steady(client: Client, seconds: float, priority: str = "normal") -> tuple[float, float]:
    """Answered requests/s of a small tenant that sends SMALL_RATE a second, and their p50 latency in ms."""
    handles: list[Handle] = []
    started = time.perf_counter()
    while (now := time.perf_counter() - started) < seconds:
        due = int(now * SMALL_RATE) - len(handles)
        with suppress(Overloaded):  # it is told when there is room, and sends what is due then
            for _ in range(due):
                handles.append(client.submit(request("small", priority)))  # noqa: PERF401  # those before a full queue count
        time.sleep(0.005)
    answered = sum(handle.done() for handle in handles)  # what comes after the end is too late
    elapsed = time.perf_counter() - started
    outcomes = [handle.outcome(120) for handle in handles]
    latencies = [outcome.latency_ms for outcome in outcomes if isinstance(outcome, InferenceResult)]
    return answered / elapsed, median(latencies)


def main() -> None:
    """Run the rounds and print the table and the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement")
    parser.add_argument("--depth", type=int, default=4000, help="requests that a flood keeps waiting")
    options = parsed(parser, rounds=1, seconds=1.0, depth=200)
    with scratch_broker() as (folder, url):
        config = write_yaml(folder / "fleet.yaml", {**CONFIG, "fleet": {"queue_capacity": options.depth}})
        environ = {"REDIS_URL": url, "MUAI_CONFIG": str(config)}
        os.environ.update(environ)
        with (
            celery_worker(["-A", "workers", "worker", "-Q", "fake"], environ, folder / "worker.log"),
            Client(settings=load_settings(config, environ)) as client,
        ):
            wait_for(client.fleet, "the worker is not there")
            steady(client, 2)
            alone, beside, low = [], [], []
            for _ in range(options.rounds):
                alone.append(steady(client, options.seconds))
                with flooding(environ, client, "normal", options.depth):
                    beside.append(steady(client, options.seconds))
                with flooding(environ, client, "high", options.depth):
                    low.append(steady(client, options.seconds, "low"))
    table = Table(title=f"a tenant that sends {SMALL_RATE:.0f} a second", title_justify="left")
    for column in ("", "answered a second", "p50 ms"):
        table.add_column(column, justify="right")
    names = ("alone", "beside a flood", "low priority, beside a flood of high")
    for name, rows in zip(names, (alone, beside, low), strict=True):
        table.add_row(name, f"{median([row[0] for row in rows]):.1f}", f"{median([row[1] for row in rows]):.1f}")
    Console(width=100).print(table)
    print(f"throughput_kept_beside_a_flood: {median([b[0] / a[0] for a, b in zip(alone, beside, strict=True)]):.3f}")
    print(f"low_priority_share_beside_a_flood: {median([row[0] for row in low]) / (BATCH / BATCH_MS * 1000):.3f}")


if __name__ == "__main__":
    main()
