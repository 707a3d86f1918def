"""Made the files of this folder, from the code of release 0.1.0; README.md says how. Not run again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redis
import yaml
from celery import Celery, chain, chord, group

from producer import Client
from shared import keys
from shared.contract import EngineName, Kind
from shared.embedded import EmbeddedBroker
from shared.registry import EngineInfo, ServedModel, WorkerInfo, WorkerRegistry
from shared.settings_loader import load_settings

SOURCE = Path(sys.modules["shared"].__file__ or "").parents[1]
SIGNING_KEY = "the signing key of the recorded fleet"

CONFIG: dict[str, Any] = {
    "optimization": {"engine_preference": ["fake", "onnx"], "batcher": {"max_batch_size": 4}},
    "fleet": {
        "lease_seconds": 2.0, "sweep_seconds": 0.3, "heartbeat_seconds": 10.0, "max_deliveries": 2,
        "rescue_after_seconds": 600.0,
    },
    "models": {
        "catalog": {
            "echo": {"path": "fake", "kinds": [kind.value for kind in Kind], "engines": ["fake"]},
            "two": {"path": "fake", "kinds": ["generate"], "engines": ["fake", "onnx"]},
        }
    },
}  # fmt: skip

OTHER_WORKER = WorkerInfo(
    id="onnx", host="h", pid=1, started=1.0, queues=("onnx",),
    engines=(EngineInfo(name=EngineName.ONNX, models={"two": ServedModel(kinds=(Kind.GENERATE,))}),),
)  # fmt: skip


def prompt(text: str, **fields: Any) -> dict[str, Any]:
    """A request to generate."""
    return {"model": "echo", "inputs": {"prompt": text}, **fields}


CLIENT = [
    prompt("first", id="first", priority="high"),
    prompt("second", id="second", priority="high"),
    prompt("of a tenant", id="tenant", priority="high", tenant="acme"),
    prompt("hello", id="generate"),
    {"id": "chat", "model": "echo", "kind": "chat", "inputs": {"messages": [{"role": "system", "content": "be brief"},
                                                                            {"role": "user", "content": "hello"}]}},
    *({"id": kind, "model": "echo", "kind": kind, "inputs": {"texts": ["one", "two"]}}
      for kind in ("embed", "classify", "summarize", "translate")),
    {"id": "rerank", "model": "echo", "kind": "rerank", "inputs": {"texts": ["one", "two"], "query": "which"}},
    prompt("all of the fields", id="fields", priority="low", tenant="acme", engine_preference=["fake"], stream=True,
           conversation_id="a conversation", deadline=4102444800.0,
           params={"max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "top_k": 40, "stop": ["x"], "seed": 7,
                   "ignore_eos": True}),
    prompt("gr\u00fc\u00dfe \u732b \"quoted\"\n\ttabbed \U0001f600", id="unicode"),
    prompt("!bad", id="bad"),
    prompt("!fail", id="fail"),
    prompt("!crash", id="crash"),
    prompt("too late", id="late", deadline=1.0e9),
    {**prompt("!fail"), "model": "two", "id": "hop"},
    {**prompt("x"), "model": "two", "id": "cancelled", "engine_preference": ["onnx"]},
]  # fmt: skip


def submit_from_celery(url: str) -> None:
    """What a Celery app without this project's code sends."""
    app = Celery("elsewhere", broker=url, backend=url, set_as_current=False)

    def infer(task_id: str, **request: Any) -> Any:
        return app.signature("muai.infer", kwargs={"request": {"model": "echo", **request}}, queue="fake",
                             task_id=task_id, priority=6)  # fmt: skip

    def send(task_id: str, request: Any, **options: Any) -> None:
        app.send_task("muai.infer", kwargs={"request": request}, queue="fake", task_id=task_id,
                      **{"priority": 6, **options})  # fmt: skip

    send("celery-delayed", prompt("delayed"), countdown=30, priority=0)
    send("celery-plain", prompt("plain"))
    app.send_task("muai.infer", args=[prompt("positional")], queue="fake", task_id="celery-positional", priority=6)
    send("celery-expired", prompt("expired"), expires=0.01)
    send("celery-expires", prompt("expires"), expires=10**9)
    send("celery-invalid", {"model": "echo", "inputs": {}})
    send("celery-unknown-field", prompt("x", colour="red"))
    send("celery-logprobs", prompt("x", params={"logprobs": 2}))
    chain(infer("chain-first", inputs={"prompt": "abc"}), infer("chain-last")).apply_async()
    group(infer(f"group-{n}", inputs={"prompt": f"g{n}"}) for n in range(2)).apply_async()
    chord([infer(f"chord-{n}", inputs={"prompt": f"c{n}"}) for n in range(2)])(infer("chord-body"))
    chain(infer("failed-chain-first", inputs={"prompt": "!bad"}), infer("failed-chain-last")).apply_async()


def snapshot(client: redis.Redis) -> dict[str, Any]:
    """What the broker holds of the fleet and of Celery's results, by key."""
    state = {}
    for key in sorted(client.scan_iter(count=1000)):
        name, kind = key.decode(), client.type(key).decode()
        value: Any
        if name.startswith(("_kombu", "celeryev")) or "pidbox" in name:
            continue
        if kind == "string":
            value = client.get(key).decode()
        elif kind == "list":
            value = [item.decode() for item in client.lrange(key, 0, -1)]
        elif kind == "hash":
            value = {field.decode(): item.decode() for field, item in client.hgetall(key).items()}
        elif kind == "zset":
            value = {member.decode(): score for member, score in client.zrange(key, 0, -1, withscores=True)}
        else:
            value = [[entry.decode(), {field.decode(): item.decode(errors="replace") for field, item in fields.items()}]
                     for entry, fields in client.xrange(key)]  # fmt: skip
        state[name] = {"type": kind, "value": value}
    return state


class Stage:
    """A broker and the workers on it."""

    def __init__(self, folder: Path, broker: EmbeddedBroker) -> None:
        self.folder = folder
        self.url = broker.url
        self.client = redis.Redis.from_url(broker.url)
        self.registry = WorkerRegistry(self.client, 600)

    def settings(self, name: str, **environ: str) -> Any:
        """The settings that a process has."""
        return load_settings(self.folder / f"{name}.yaml", {"REDIS_URL": self.url, **environ})

    def worker(self, name: str, latency_ms: int) -> subprocess.Popen[bytes]:
        """Start a worker and wait until it has announced itself."""
        config = {**CONFIG, "optimization": {**CONFIG["optimization"], "fake": {"latency_ms": latency_ms}}}
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "celery", "-A", "workers", "worker", "-Q", "fake", "-l", "info"], cwd=SOURCE,
                env={**os.environ, "REDIS_URL": self.url, "MUAI_CONFIG": str(path), "PYTHONPATH": str(SOURCE)},
                stdout=log, stderr=log,
            )  # fmt: skip
        self.until(lambda: any(worker.pid == process.pid and worker.engines for worker in self.registry.live()), name)
        return process

    def until(self, condition: Callable[[], Any], what: str) -> None:
        """Wait for a condition; meanwhile another engine's worker lives."""
        end = time.monotonic() + 120
        while not condition():
            if time.monotonic() > end:
                raise TimeoutError(what, self.client.zrange(keys.LEASE_INDEX, 0, -1))
            self.registry.announce(OTHER_WORKER)
            time.sleep(0.1)

    def leases_of_every_sort(self) -> bool:
        """Whether a request, one of a tenant, and a message that waits for its time are leased."""
        leases = [lease.decode() for lease in self.client.zrange(keys.LEASE_INDEX, 0, -1)]
        delayed = [lease for lease in leases if lease.startswith(keys.DELAYED_PREFIX)]
        laned = [lease for lease in leases if "/" in lease]
        return bool(delayed and laned and len(leases) > len(delayed) + len(laned))


def record(folder: Path, stage: Stage) -> None:
    """Take the fleet through its life and keep what the broker holds at each step."""
    slow = stage.worker("slow", 600_000)
    slow.send_signal(signal.SIGSTOP)
    submit_from_celery(stage.url)
    with Client(settings=stage.settings("slow")) as client:
        client.submit_many(CLIENT)
        client.cancel("cancelled")
        stage.client.lpush("fake", b"not a message")
        write(folder / "waiting.json", snapshot(stage.client))

        slow.send_signal(signal.SIGCONT)
        stage.until(stage.leases_of_every_sort, "leases, one of them a tenant's, and a delayed message")
        slow.kill()
        write(folder / "leased.json", snapshot(stage.client))

        slow = stage.worker("slow", 600_000)
        stage.until(lambda: b'"deliveries":1' in b"".join(stage.client.hvals(keys.LEASE_MESSAGES)), "a redelivery")
        slow.kill()
        write(folder / "redelivered.json", snapshot(stage.client))

        worker = stage.worker("quick", 0)
        last = [keys.result_key(task) for task in ("hop", "celery-delayed", "chord-body", "group-1")]
        stage.until(
            lambda: (
                stage.client.exists(*last) == len(last)
                and not stage.client.exists(*keys.lists_of("fake"))
                and not stage.client.zcard(keys.LEASE_INDEX)
            ),
            "all ends",
        )
        write(folder / "ended.json", snapshot(stage.client))
        worker.terminate()
        worker.wait()


def record_signed(folder: Path, stage: Stage) -> None:
    """A message that is signed."""
    stage.client.flushall()
    settings = stage.settings("quick", MUAI_FLEET_SIGNING_KEY=SIGNING_KEY)
    with Client(settings=settings) as client:
        client.submit(prompt("signed", id="signed", deadline=4102444800.0))
        write(folder / "signed.json", snapshot(stage.client))


def record_spool(folder: Path, stage: Stage, scratch: Path) -> None:
    """Requests that wait for a broker that is away."""
    settings = stage.settings("quick", MUAI_FLEET_REDIS_URL="redis://127.0.0.1:1/0",
                              MUAI_FLEET_SPOOL_PATH=str(scratch / "spool.db"))  # fmt: skip
    with Client(settings=settings, on_outage="spool") as client:
        client.submit_many([prompt("spooled", id="spooled-1", priority="low"), prompt("\u732b", id="spooled-2")])
    shutil.copy(scratch / "spool.db", folder / "spool.db")


def write(path: Path, state: dict[str, Any]) -> None:
    """Keep a state of the broker."""
    path.write_text(json.dumps(state, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as name, EmbeddedBroker(Path(name) / "broker") as embedded:
        stage = Stage(Path(name), embedded)
        record(target, stage)
        record_signed(target, stage)
        record_spool(target, stage, Path(name))
