"""``make bench-queue``: what the queue path costs, against plain Celery with the threads pool.

Same broker, same payload, same machine, the same answer computed; the two alternate, so that noise hits both. Ours runs
as it does for users: task events on, results stored for any AsyncResult and sent to the client's reply stream.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, fields

import psutil
from rich.console import Console
from rich.table import Table

from producer import Client
from shared.settings_loader import load_settings
from tests.benchmarks.harness import celery_worker, cpu_seconds, median, scratch_broker, wait_for, write_yaml

PROMPT = "x" * 200
CONFIG = {
    "optimization": {"engine_preference": ["fake"]},
    "models": {"catalog": {"echo": {"path": "fake", "kinds": ["generate"], "engines": ["fake"]}}},
}


def request() -> dict[str, object]:
    """One request of 200 characters."""
    return {"model": "echo", "inputs": {"prompt": PROMPT}}


@dataclass(frozen=True)
class Round:
    """What one round measured."""

    per_second: float
    worker_us: float
    producer_us: float
    idle_p50_ms: float
    idle_p99_ms: float


def measure(
    count: int, idle: int, worker: psutil.Process, many: Callable[[int], None], one: Callable[[], None]
) -> Round:
    """Submit ``count`` and wait for all results; then ``idle`` single ones, each after the other."""
    cpu, own, started = cpu_seconds(worker), time.process_time(), time.perf_counter()
    many(count)
    wall = time.perf_counter() - started
    own = time.process_time() - own
    cpu = cpu_seconds(worker) - cpu
    latencies = []
    for _ in range(idle):
        begun = time.perf_counter()
        one()
        latencies.append((time.perf_counter() - begun) * 1000)
    latencies.sort()
    return Round(
        count / wall, cpu / count * 1e6, own / count * 1e6, median(latencies), latencies[int(len(latencies) * 0.99)]
    )


def main() -> None:
    """Run the rounds and print the table and the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=10000, help="requests a round, ours")
    parser.add_argument("--plain-count", type=int, default=1500, help="requests a round, plain Celery")
    parser.add_argument("--idle", type=int, default=200, help="lone requests a round, each")
    options = parser.parse_args()
    with scratch_broker() as (folder, url):
        config = write_yaml(folder / "fleet.yaml", CONFIG)
        environ = {"REDIS_URL": url, "MUAI_CONFIG": str(config)}
        os.environ.update(environ)
        from tests.benchmarks import plain_celery

        ours = ["-A", "workers", "worker", "-Q", "fake", "-n", "ours@%h"]
        plain = ["-A", "tests.benchmarks.plain_celery", "worker", "-P", "threads", "-Q", "plain", "-n", "plain@%h"]
        with (
            celery_worker(ours, environ, folder / "ours.log") as our_worker,
            celery_worker(plain, environ, folder / "plain.log") as plain_worker,
            Client(settings=load_settings(config, environ)) as client,
        ):
            wait_for(client.fleet, "the fleet's worker is not there")

            def ours_many(count: int) -> None:
                for _ in client.map((request() for _ in range(count)), window=1024):
                    pass

            def plain_many(count: int) -> None:
                results = [plain_celery.infer.delay(request()) for _ in range(count)]
                for result in results:
                    result.get()

            def ours_one() -> None:
                client.submit(request()).result(10)

            def plain_one() -> None:
                plain_celery.infer.delay(request()).get(timeout=10)

            plain_one()  # waits until plain Celery's worker is there, too
            measure(500, 20, our_worker, ours_many, ours_one)
            measure(200, 20, plain_worker, plain_many, plain_one)
            rounds = [
                (
                    measure(options.count, options.idle, our_worker, ours_many, ours_one),
                    measure(options.plain_count, options.idle, plain_worker, plain_many, plain_one),
                )
                for _ in range(options.rounds)
            ]
    show(rounds)


def show(rounds: list[tuple[Round, Round]]) -> None:
    """A table for people, then the figures."""
    table = Table(title=f"median of {len(rounds)} rounds, alternating", title_justify="left")
    for column in ("", "requests/s", "worker us/request", "producer us/request", "idle p50 ms", "idle p99 ms"):
        table.add_column(column, justify="right")
    columns = [field.name for field in fields(Round)]
    for name, side in (("MuAI Fleet", 0), ("plain Celery, threads", 1)):
        values = [median([getattr(pair[side], column) for pair in rounds]) for column in columns]
        table.add_row(
            name, f"{values[0]:,.0f}", f"{values[1]:.0f}", f"{values[2]:.0f}", f"{values[3]:.2f}", f"{values[4]:.2f}"
        )
    ratios = [median([getattr(a, column) / getattr(b, column) for a, b in rounds]) for column in columns]
    table.add_row("ratio", *(f"{ratio:.2f}" for ratio in ratios))
    Console(width=110).print(table)
    per_round = [a.per_second / b.per_second for a, b in rounds]
    print("requests/s against plain Celery, a round each: " + ", ".join(f"{ratio:.1f}" for ratio in per_round))
    print(f"end_to_end_vs_celery: {ratios[0]:.2f}")
    print(f"worker_us_per_request: {median([a.worker_us for a, _ in rounds]):.1f}")
    print(f"producer_us_per_request: {median([a.producer_us for a, _ in rounds]):.1f}")
    print(f"idle_p50_ms: {median([a.idle_p50_ms for a, _ in rounds]):.3f}")


if __name__ == "__main__":
    main()
