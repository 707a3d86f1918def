"""``make bench-queue``: what the queue path costs, against plain Celery with the threads pool and against dramatiq.

Same broker, same payload, same machine, the same answer computed; the three alternate, so that noise hits all. Ours
runs as it does for users: task events on (nobody subscribes to them), results stored for any AsyncResult and sent to
the client's reply stream. The others run as theirs do, with a result for every request; dramatiq has the threads that
serve it best here.

Beside them, the floor under a lone request on this machine: a message through two lists of the broker and back.

After that, ours alone: what a worker costs that has nothing to do, what a lone message costs the broker where many
workers wait for it, and what a request costs while a million wait.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import redis
from rich.console import Console
from rich.table import Table

from producer import Client
from shared.settings_loader import load_settings
from tests.benchmarks.broker_commands import commands_per_message, more_workers
from tests.benchmarks.harness import (
    broker_process,
    celery_worker,
    cpu_seconds,
    median,
    module_process,
    parsed,
    scratch_broker,
    wait_for,
    write_yaml,
)
from tests.benchmarks.ping_pong import PING, PONG
from tests.benchmarks.queue_depth import Backlog, cost_us, require_memory

PROMPT = "x" * 200
CONFIG = {
    "optimization": {"engine_preference": ["fake"]},
    "models": {"catalog": {"echo": {"path": "fake", "kinds": ["generate"], "engines": ["fake"]}}},
}
PAUSE_SECONDS = 0.02
"""A lone request comes up to this long after the answer to the one before, at random: it meets timers by chance."""

SHALLOW = 1000
IDLE_WORKERS = 8
"""Workers that wait while lone messages come, where their commands are counted."""

DRAMATIQ = ["dramatiq", "tests.benchmarks.plain_dramatiq", "-p", "1", "-t", "32"]
"""Fewer threads, two processes or a longer prefetch were no faster."""


def request() -> dict[str, object]:
    """One request of 200 characters."""
    return {"model": "echo", "inputs": {"prompt": PROMPT}}


@dataclass(frozen=True)
class Round:
    """What one round measured. ``idle_ms`` are the latencies of lone requests, in order of size."""

    per_second: float
    worker_us: float
    broker_us: float
    producer_us: float
    idle_ms: list[float]

    @property
    def idle_p50_ms(self) -> float:
        """The median of a lone request."""
        return median(self.idle_ms)


@dataclass(frozen=True)
class Side:
    """One of those compared: how many requests a round it gets, and how it runs many or one and waits for results."""

    name: str
    worker: psutil.Process
    broker: psutil.Process
    many: Callable[[int], None]
    one: Callable[[], None]
    count: int
    idle: int

    def warm_up(self) -> None:
        """Wait until its worker answers, and let what is lazy happen."""
        self.one()
        self.many(self.count // 10)

    def measure(self) -> Round:
        """Many requests at once, all results waited for; then single ones."""
        worker, broker = cpu_seconds(self.worker), cpu_seconds(self.broker)
        own, started = time.process_time(), time.perf_counter()
        self.many(self.count)
        wall, own = time.perf_counter() - started, time.process_time() - own
        worker, broker = cpu_seconds(self.worker) - worker, cpu_seconds(self.broker) - broker
        worker_us, broker_us, own_us = (seconds / self.count * 1e6 for seconds in (worker, broker, own))
        return Round(self.count / wall, worker_us, broker_us, own_us, lone_ms(self.one, self.idle))


def lone_ms(one: Callable[[], object], count: int) -> list[float]:
    """How long each of ``count`` lone calls took, in order of size."""
    found = []
    for _ in range(count):
        time.sleep(random.uniform(0, PAUSE_SECONDS))
        started = time.perf_counter()
        one()
        found.append((time.perf_counter() - started) * 1000)
    return sorted(found)


def main() -> None:
    """Run the rounds and print the table and the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=10000, help="requests a round, ours")
    parser.add_argument("--plain-count", type=int, default=1500, help="requests a round, plain Celery")
    parser.add_argument("--dramatiq-count", type=int, default=4000, help="requests a round, dramatiq")
    parser.add_argument("--idle", type=int, default=250, help="lone requests a round, ours; a tenth, the others")
    parser.add_argument("--idle-seconds", type=float, default=20, help="how long the idle worker is watched")
    parser.add_argument("--waiting", type=int, default=1_000_000, help="requests that wait in the deep queue")
    parser.add_argument("--depth-rounds", type=int, default=3, help="times that the two depths are compared")
    parser.add_argument("--depth-count", type=int, default=20000, help="requests consumed at each depth")
    options = parsed(
        parser, rounds=1, count=300, plain_count=40, dramatiq_count=100, idle=20, idle_seconds=0.5, waiting=3000,
        depth_rounds=1, depth_count=1000,
    )  # fmt: skip
    require_memory(options.waiting)
    with scratch_broker() as (folder, url):
        config = write_yaml(folder / "fleet.yaml", CONFIG)
        environ = {"REDIS_URL": url, "MUAI_CONFIG": str(config)}
        os.environ.update(environ)
        broker = broker_process(url)
        ours = ["-A", "workers", "worker", "-Q", "fake", "-n", "ours@%h"]
        with (
            celery_worker(ours, environ, folder / "ours.log") as worker,
            Client(settings=load_settings(config, environ)) as client,
        ):
            wait_for(client.fleet, "the fleet's worker is not there")

            def many(count: int) -> None:
                for _ in client.map((request() for _ in range(count)), window=1024):
                    pass

            def one() -> None:
                client.submit(request()).result(10)

            fleet = Side("MuAI Fleet", worker, broker, many, one, options.count, options.idle)
            plain = ["-A", "tests.benchmarks.plain_celery", "worker", "-P", "threads", "-Q", "plain", "-n", "plain@%h"]
            with (
                celery_worker(plain, environ, folder / "plain.log") as plain_worker,
                module_process(DRAMATIQ, environ, folder / "dramatiq.log") as dramatiq_worker,
                module_process(["tests.benchmarks.ping_pong"], environ, folder / "floor.log"),
                redis.Redis.from_url(url, socket_timeout=None) as pinger,
            ):

                def ping() -> None:
                    pinger.lpush(PING, PROMPT)
                    pinger.blpop([PONG])

                sides = [
                    fleet,
                    plain_side(plain_worker, broker, options.plain_count, options.idle // 10),
                    dramatiq_side(dramatiq_worker, broker, options.dramatiq_count, options.idle // 10),
                ]
                for side in sides:
                    side.warm_up()
                ping()
                rounds, floors = [], []
                for _ in range(options.rounds):
                    ours_now = fleet.measure()
                    floors.append(lone_ms(ping, options.idle))
                    rounds.append([ours_now, *(side.measure() for side in sides[1:])])
            idle_percent = idle_cpu_percent(worker, options.idle_seconds)
            with redis.Redis.from_url(url) as connection:
                commands = commands_per_message(connection, one, options.idle)
                with more_workers(IDLE_WORKERS - 1, environ, folder, client):
                    crowd = commands_per_message(connection, one, options.idle)
                backlog = Backlog(connection, "fake", "echo")
                costs = []
                for _ in range(options.depth_rounds):
                    shallow = cost_us(backlog, SHALLOW, options.depth_count, [worker, broker])
                    deep = cost_us(backlog, options.waiting, options.depth_count, [worker, broker])
                    backlog.drop()
                    costs.append((shallow, deep))
    show([side.name for side in sides], rounds)
    show_floor([sides[0].idle_ms for sides in rounds], floors)
    print(f"commands_per_message: {commands:.1f}")
    print(f"commands_per_message_{IDLE_WORKERS}_idle_vs_1: {crowd / commands:.2f}")
    each = ", ".join(f"{shallow:.0f} -> {deep:.0f}" for shallow, deep in costs)
    print(f"worker and broker us/request, {SHALLOW:,} -> {options.waiting:,} waiting, a round each: {each}")
    print(f"cost_at_1m_vs_1k: {median([deep / shallow for shallow, deep in costs]):.3f}")
    print(f"idle_worker_cpu_percent: {idle_percent:.2f}")


def plain_side(worker: psutil.Process, broker: psutil.Process, count: int, idle: int) -> Side:
    """Plain Celery, one worker process with the threads pool."""
    from tests.benchmarks.plain_celery import infer

    def many(count: int) -> None:
        for result in [infer.delay(request()) for _ in range(count)]:
            result.get()

    def one() -> None:
        infer.delay(request()).get(timeout=60)

    return Side("plain Celery, threads", worker, broker, many, one, count, idle)


def dramatiq_side(worker: psutil.Process, broker: psutil.Process, count: int, idle: int) -> Side:
    """dramatiq, one worker process."""
    from tests.benchmarks.plain_dramatiq import infer

    def many(count: int) -> None:
        for message in [infer.send(request()) for _ in range(count)]:
            message.get_result(block=True, timeout=60_000)

    def one() -> None:
        infer.send(request()).get_result(block=True, timeout=60_000)

    return Side("dramatiq", worker, broker, many, one, count, idle)


def idle_cpu_percent(worker: psutil.Process, seconds: float) -> float:
    """How much of a core a worker and its child processes take while nothing comes."""
    spent, started = cpu_seconds(worker), time.perf_counter()
    time.sleep(seconds)
    return (cpu_seconds(worker) - spent) / (time.perf_counter() - started) * 100


def percentile_99(rounds: list[list[float]]) -> float:
    """Of the latencies of all rounds together: one round has too few."""
    latencies = sorted(ms for found in rounds for ms in found)
    return latencies[int(len(latencies) * 0.99)]


def show_floor(idle: list[list[float]], floors: list[list[float]]) -> None:
    """Lone requests against the floor that was measured right after them."""
    ratio = median([median(ours) / median(floor) for ours, floor in zip(idle, floors, strict=True)])
    print(f"floor_p50_ms: {median([ms for floor in floors for ms in floor]):.3f}")
    print(f"floor_p99_ms: {percentile_99(floors):.3f}")
    print(f"idle_p50_vs_floor: {ratio:.2f}")
    print(f"idle_p99_vs_floor: {percentile_99(idle) / percentile_99(floors):.2f}")


def show(names: list[str], rounds: list[list[Round]]) -> None:
    """A table for people, then the figures."""
    columns: dict[str, Callable[[Round], float]] = {
        "requests/s": lambda found: found.per_second,
        "worker us": lambda found: found.worker_us,
        "broker us": lambda found: found.broker_us,
        "producer us": lambda found: found.producer_us,
        "lone p50 ms": lambda found: found.idle_p50_ms,
    }
    table = Table(title=f"median of {len(rounds)} rounds, alternating; us of processor time per request",
                  title_justify="left")  # fmt: skip
    for column in ("", *columns, "lone p99 ms"):
        table.add_column(column, justify="right")
    p99 = [percentile_99([sides[side].idle_ms for sides in rounds]) for side in range(len(names))]
    for side, name in enumerate(names):
        values = [median([value(sides[side]) for sides in rounds]) for value in columns.values()]
        table.add_row(name, *(f"{value:,.{2 if value < 10 else 0}f}" for value in values), f"{p99[side]:.2f}")

    def ratio(side: int, value: Callable[[Round], float]) -> float:
        return median([value(sides[0]) / value(sides[side]) for sides in rounds])

    for side, name in enumerate(names[1:], start=1):
        ratios = [ratio(side, value) for value in columns.values()]
        table.add_row(f"ratio to {name}", *(f"{value:.2f}" for value in ratios), f"{p99[0] / p99[side]:.2f}")
    Console(width=120).print(table)
    for side, name in enumerate(names[1:], start=1):
        each = ", ".join(f"{sides[0].per_second / sides[side].per_second:.1f}" for sides in rounds)
        print(f"requests/s against {name}, a round each: {each}")
    print(f"end_to_end_vs_celery: {ratio(1, lambda found: found.per_second):.2f}")
    print(f"end_to_end_vs_dramatiq: {ratio(2, lambda found: found.per_second):.2f}")
    print(f"worker_us_per_request: {median([sides[0].worker_us for sides in rounds]):.1f}")
    print(f"producer_us_per_request: {median([sides[0].producer_us for sides in rounds]):.1f}")
    print(f"idle_p50_ms: {median([sides[0].idle_p50_ms for sides in rounds]):.3f}")
    print(f"idle_p99_ms: {p99[0]:.3f}")


if __name__ == "__main__":
    main()
