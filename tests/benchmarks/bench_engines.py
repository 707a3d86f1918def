"""``make bench-engines``: what the fleet leaves of each engine's own speed, and of vLLM's own server's.

Models with random weights, made on the spot: one of 30 million parameters, and one of 0.6 million, where our own cost
shows. Each engine is called directly in its best batched form, by a process that has nothing of the fleet in it, in
turns with a fleet of one worker and one client. Every side is given the same prompts at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table

from producer import AsyncClient, Client
from shared.settings import Settings
from shared.settings_loader import load_settings
from tests.benchmarks.harness import celery_worker, ending, median, parsed, scratch_broker, wait_for, write_yaml
from tests.support.tiny_models import make_llama

LARGE = {
    "hidden_size": 512, "intermediate_size": 1664, "num_hidden_layers": 9, "num_attention_heads": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
SMALL = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "head_dim": 32}
LIBRARIES = {"vllm": "vllm", "deepspeed": "deepspeed", "onnx": "onnxruntime", "pytorch": "torch"}
BATCH = 64
CALLERS = 64
MAX_TOKENS = 32

Side = Callable[[list[str]], float]
"""Answers prompts and returns the seconds it took."""

Found = tuple[float, float, float]
"""Requests/s of the baseline and of the fleet, and the fleet's share of the baseline's."""


def prompts(number: int, round_: int) -> list[str]:
    """Prompts of some 30 tokens, other ones in each round: no prefix is cached from the round before."""
    return [f"{round_:3d}-{i:4d} asks about something" for i in range(number)]


@contextmanager
def direct(name: str, model: Path, log: Path) -> Iterator[Side]:
    """An engine in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.engine_direct", name, str(model), str(BATCH)]
    with (
        log.open("wb") as err,
        ending(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err, text=True) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        if process.stdout.readline().strip() != "ready":
            raise RuntimeError(f"{name} does not start directly; see {log}:\n{log.read_text()[-2000:]}")

        def run(asked: list[str]) -> float:
            print(json.dumps({"prompts": asked, "max_tokens": MAX_TOKENS}), file=process.stdin, flush=True)
            return float(process.stdout.readline())

        yield run


@contextmanager
def fleet(name: str, model: Path, folder: Path, url: str) -> Iterator[Settings]:
    """A worker of the engine, with the model loaded."""
    config = write_yaml(
        folder / f"{name}-{model.name}.yaml",
        {
            "optimization": {
                "engine_preference": [name], "batcher": {"max_batch_size": BATCH}, "vllm": {"max_num_seqs": BATCH},
                "deepspeed": {"dtype": "float32", "replace_with_kernel_inject": False},
                "parity": {"enabled": False},
            },
            "monitoring": {"server": {"preload_models": ["m"]}},
            "models": {
                "cache_dir": str(model.parent / "cache"),
                "catalog": {"m": {"path": str(model), "kinds": ["generate"]}},
            },
        },
    )  # fmt: skip
    environ = {"REDIS_URL": url, "MUAI_CONFIG": str(config)}
    settings = load_settings(config, environ)
    with (
        celery_worker(["-A", "workers", "worker", "-Q", name], environ, folder / f"{name}-{model.name}.log"),
        Client(settings=settings) as client,
    ):
        wait_for(client.fleet, f"the {name} worker is not there")
        yield settings
    with Client(settings=settings) as client:
        wait_for(lambda: not client.fleet(), f"the {name} worker is still there")


def request(prompt: str) -> dict[str, object]:
    """A request that always writes MAX_TOKENS."""
    return {"model": "m", "inputs": {"prompt": prompt}, "params": {"max_tokens": MAX_TOKENS, "ignore_eos": True}}


def through(client: Client) -> Side:
    """The fleet, given all prompts at once."""

    def run(asked: list[str]) -> float:
        started = time.perf_counter()
        for handle in client.submit_many([request(prompt) for prompt in asked]):
            handle.result(600)
        return time.perf_counter() - started

    return run


def compare(name: str, model: Path, folder: Path, settings: Settings, number: int, rounds: int) -> Found:
    """An engine called directly, in the best of its forms, and the fleet."""
    baselines = ["transformers", "pytorch"] if name == "pytorch" else [name]
    ratios, rates = [], []
    with ExitStack() as stack:
        sides = [stack.enter_context(direct(side, model, folder / f"direct-{side}.log")) for side in baselines]
        own = through(stack.enter_context(Client(settings=settings)))
        for side in [*sides, own]:
            side(prompts(number, 0))
        for round_ in range(1, rounds + 1):
            asked = prompts(number, round_)
            best = min(side(asked) for side in sides)
            taken = own(asked)
            rates.append((number / best, number / taken))
            ratios.append(best / taken)
    return median([a for a, _ in rates]), median([b for _, b in rates]), median(ratios)


# --- vLLM's own server --------------------------------------------------------------------------------------------


@contextmanager
def vllm_server(model: Path, log: Path) -> Iterator[str]:
    """The OpenAI server of vLLM, with the arguments that the fleet gives its engine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "m",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager",
        "--max-num-seqs", str(BATCH), "--disable-log-stats",
    ]  # fmt: skip
    environ = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING", **os.environ}
    with log.open("wb") as out, ending(command, env=environ, stdout=out, stderr=out):
        wait_for(lambda: _listens(port), "vLLM's server does not listen")
        yield f"http://127.0.0.1:{port}"


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def http_load(url: str, asked: list[str]) -> float:
    """Seconds that CALLERS callers take over HTTP, each waiting for its answer before it asks again."""
    import aiohttp

    waiting = iter(asked)

    async def call(session: aiohttp.ClientSession) -> None:
        for prompt in waiting:
            body = {"model": "m", "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True}
            async with session.post(f"{url}/v1/completions", json=body) as answer:
                assert answer.status == 200, await answer.text()
                await answer.json()

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        started = time.perf_counter()
        await asyncio.gather(*(call(session) for _ in range(CALLERS)))
        return time.perf_counter() - started


async def fleet_load(settings: Settings, asked: list[str]) -> float:
    """The same through the fleet."""
    waiting = iter(asked)
    async with AsyncClient(settings=settings) as client:

        async def call() -> None:
            for prompt in waiting:
                handle = await client.submit(request(prompt))
                await handle.result(600)

        started = time.perf_counter()
        await asyncio.gather(*(call() for _ in range(CALLERS)))
        return time.perf_counter() - started


def compare_server(model: Path, folder: Path, settings: Settings, number: int, rounds: int) -> Found:
    """VLLM's server and the fleet on vLLM."""
    rates, ratios = [], []
    with vllm_server(model, folder / "server.log") as server:
        for round_ in range(rounds + 1):
            asked = prompts(number, 100 + round_)
            theirs = asyncio.run(http_load(server, asked))
            ours = asyncio.run(fleet_load(settings, asked))
            if round_:
                rates.append((number / theirs, number / ours))
                ratios.append(theirs / ours)
    return median([a for a, _ in rates]), median([b for _, b in rates]), median(ratios)


def one_by_one(model: Path, log: Path, number: int, rounds: int, first: int) -> list[float]:
    """Requests/s of PyTorch that is given one request at a time, in each round."""
    few = max(8, number // 8)
    with direct("pytorch-unbatched", model, log) as alone:
        alone(prompts(few, first))
        return [few / alone(prompts(few, first + round_)) for round_ in range(1, rounds + 1)]


def compare_vllm(
    model: Path, folder: Path, url: str, number: int, rounds: int, *, itself: bool
) -> Iterator[tuple[str, Found]]:
    """VLLM through the fleet against its server, against PyTorch without batches and, where asked, against ``itself``.

    PyTorch comes before and after: an idle engine beside it would take processor time from its threads. Of a single
    round it comes before only.
    """
    log = folder / "unbatched.log"
    alone = one_by_one(model, log, number, rounds, 200)
    with fleet("vllm", model, folder, url) as settings:
        loads = [asyncio.run(fleet_load(settings, prompts(number, 300 + round_))) for round_ in range(rounds + 1)]
        if itself:
            yield "fleet_vs_engine_vllm", compare("vllm", model, folder, settings, number, rounds)
        yield "fleet_vs_vllm_serve", compare_server(model, folder, settings, number, rounds)
    if rounds > 1:
        alone += one_by_one(model, log, number, rounds, 400)
    theirs, ours = median(alone), median([number / seconds for seconds in loads[1:]])
    yield "vllm_vs_pytorch_unbatched", (theirs, ours, ours / theirs)


def comparisons(options: argparse.Namespace, folder: Path, url: str) -> Iterator[tuple[str, Found]]:
    """What was asked for, one comparison after the other."""
    engines = [] if options.server_only else options.engines.split(",")
    for name in [name for name in engines if find_spec(LIBRARIES[name]) is None]:
        print(f"{name} is not installed: make setup-engines", file=sys.stderr)
        engines.remove(name)
    large = make_llama(folder / "large", **(SMALL if options.short else LARGE))
    server = not options.no_server and "vllm" in options.engines and find_spec("vllm") is not None
    if server:
        yield from compare_vllm(large, folder, url, options.requests, options.rounds, itself="vllm" in engines)
    for name in engines:
        if name != "vllm" or not server:
            with fleet(name, large, folder, url) as settings:
                found = compare(name, large, folder, settings, options.requests, options.rounds)
                yield f"fleet_vs_engine_{name}", found
        if options.small_requests:
            small = folder / "small" if (folder / "small").exists() else make_llama(folder / "small", **SMALL)
            with fleet(name, small, folder, url) as settings:
                found = compare(name, small, folder, settings, options.small_requests, options.rounds)
                yield f"fleet_vs_engine_{name}_small", found


def main() -> None:
    """Run the comparisons and print the table and the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", default=",".join(LIBRARIES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=128, help="each side and round, with the large model")
    parser.add_argument("--small-requests", type=int, default=1024, help="the same with the small one; 0 leaves it out")
    parser.add_argument("--no-server", action="store_true", help="leave vLLM's own server out")
    parser.add_argument("--server-only", action="store_true", help="nothing but vLLM against its server and PyTorch")
    options = parsed(parser, rounds=1, requests=16, small_requests=0)
    rows: list[tuple[str, Found]] = []
    with scratch_broker() as (folder, url):
        for name, found in comparisons(options, folder, url):
            rows.append((name, found))
            print(f"{name}: {found[0]:.1f} and {found[1]:.1f} requests/s", file=sys.stderr, flush=True)
    table = Table(title=f"{MAX_TOKENS} tokens a request, medians of {options.rounds} rounds", title_justify="left")
    for column in ("", "baseline, requests/s", "fleet, requests/s", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    for name, (base, own, ratio) in rows:
        table.add_row(name, f"{base:.1f}", f"{own:.1f}", f"{ratio:.3f}")
    Console(width=100).print(table)
    for name, (_, _, ratio) in rows:
        print(f"{name}: {ratio:.3f}")


if __name__ == "__main__":
    main()
