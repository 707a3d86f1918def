"""``make bench-batching``: what micro-batching gains, and what it costs a lone caller.

A small model with random weights, made on the spot, on the PyTorch engine. Two fleets on one broker, the same but for
``batcher.enabled``, take turns: 64 callers, each with one request under way at a time; then a single caller.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from producer import Client
from shared.settings_loader import load_settings
from tests.benchmarks.harness import celery_worker, median, parsed, scratch_broker, wait_for, write_yaml
from tests.support.tiny_models import make_llama

SIZES = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4}
CALLERS = 64
MAX_TOKENS = 16


def configuration(model: Path, name: str, engine: str, *, batching: bool) -> dict[str, object]:
    """A fleet that serves the model, with or without batching."""
    return {
        "optimization": {"engine_preference": [engine], "batcher": {"enabled": batching, "max_batch_size": CALLERS}},
        "monitoring": {"server": {"preload_models": [name]}},
        "models": {"catalog": {name: {"path": str(model), "kinds": ["generate"], "engines": [engine]}}},
    }


def request(model: str, number: int) -> dict[str, object]:
    """A request of some 30 tokens that always writes MAX_TOKENS."""
    prompt = f"caller {number:4d} asks about something"
    return {"model": model, "inputs": {"prompt": prompt}, "params": {"max_tokens": MAX_TOKENS, "ignore_eos": True}}


def throughput(client: Client, model: str, seconds: float) -> float:
    """Requests/s of CALLERS callers, each waiting for its answer before it asks again."""
    stop = time.perf_counter() + seconds
    counts = [0] * CALLERS

    def call(number: int) -> None:
        while time.perf_counter() < stop:
            client.submit(request(model, number)).result(120)
            counts[number] += 1

    started = time.perf_counter()
    threads = [threading.Thread(target=call, args=(number,)) for number in range(CALLERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - started)


def alone(client: Client, model: str) -> float:
    """Latency of one request on an idle fleet, ms."""
    begun = time.perf_counter()
    client.submit(request(model, 0)).result(60)
    return (time.perf_counter() - begun) * 1000


def main() -> None:
    """Run the rounds and print the table and the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0, help="of load, each fleet and round")
    parser.add_argument("--lone", type=int, default=60, help="lone requests, each fleet and round")
    parser.add_argument("--engine", default="pytorch", choices=("pytorch", "onnx"))
    options = parsed(parser, rounds=1, seconds=0.5, lone=2)
    os.environ["OMP_NUM_THREADS"] = "1"
    with scratch_broker() as (folder, url):
        model = make_llama(folder / "model", **SIZES)
        # A broker database each, so that the two fleets share the machine and nothing else.
        fleets = {}
        for number, (name, batching) in enumerate((("batched", True), ("unbatched", False))):
            config = write_yaml(
                folder / f"{name}.yaml", configuration(model, "small", options.engine, batching=batching)
            )
            fleets[name] = {"REDIS_URL": url.removesuffix("/0") + f"/{number}", "MUAI_CONFIG": str(config)}
        command = ["-A", "workers", "worker", "-Q", options.engine]
        with (
            celery_worker(command, fleets["batched"], folder / "batched.log"),
            celery_worker(command, fleets["unbatched"], folder / "unbatched.log"),
            Client(settings=load_settings(fleets["batched"]["MUAI_CONFIG"], fleets["batched"])) as batched,
            Client(settings=load_settings(fleets["unbatched"]["MUAI_CONFIG"], fleets["unbatched"])) as unbatched,
        ):
            for client in (batched, unbatched):
                wait_for(client.fleet, "a worker is not there")
                for _ in range(5):
                    alone(client, "small")
            loads, lones = [], []
            for _ in range(options.rounds):
                loads.append(
                    (throughput(batched, "small", options.seconds), throughput(unbatched, "small", options.seconds))
                )
                # Call by call in turns: what else the machine does hits both.
                pairs = [(alone(batched, "small"), alone(unbatched, "small")) for _ in range(options.lone)]
                lones.append((median([a for a, _ in pairs]), median([b for _, b in pairs])))
    table = Table(
        title=f"{options.engine}, {MAX_TOKENS} tokens, median of {options.rounds} rounds", title_justify="left"
    )
    for column in ("", f"requests/s, {CALLERS} callers", "p50 of a lone caller, ms"):
        table.add_column(column, justify="right")
    for name, side in (("batched", 0), ("unbatched", 1)):
        table.add_row(name, f"{median([p[side] for p in loads]):.1f}", f"{median([p[side] for p in lones]):.2f}")
    Console(width=100).print(table)
    print(f"batched_vs_unbatched: {median([a / b for a, b in loads]):.2f}")
    print(f"lone_caller_cost: {median([a / b for a, b in lones]):.3f}")


if __name__ == "__main__":
    main()
