"""Flower as the Procfile starts it, and Celery's own commands: what they show of the fleet is so."""

import json
import shlex
import subprocess
import sys
import threading
import urllib.request

import pytest

from shared import keys
from shared.embedded import free_port
from shared.settings_loader import load_settings
from tests.support.fleet import ROOT
from tests.support.shell import TIMEOUT
from tests.support.waiting import eventually
from workers.celery import create_app


@pytest.fixture
def waiting_fleet(make_fleet):
    """A fleet without workers: five requests wait, three of them in lanes of tenants."""
    fleet = make_fleet()
    for tenant in ("default", "default", "acme", "acme", "other"):
        fleet.client.submit(model="echo", inputs={"prompt": "x"}, tenant=tenant, timeout=600)
    return fleet


def test_flower_shows_the_broker_and_what_waits(waiting_fleet):
    """Tenants' lanes are counted; its page names the broker."""
    commands = dict(line.split(": ", 1) for line in (ROOT / "Procfile").read_text().splitlines() if ": celery" in line)
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", *shlex.split(commands["flower"]), f"--port={port}"], cwd=ROOT,
        env={**waiting_fleet.environ, "FLOWER_UNAUTHENTICATED_API": "1"}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def asked(path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.read().decode()

    def page() -> str:
        try:
            return asked("/broker")
        except OSError:
            return ""

    try:
        shown = eventually(page, TIMEOUT, "Flower's page of the broker")
        lengths = json.loads(asked("/api/queues/length"))["active_queues"]
    finally:
        process.terminate()
        process.wait(TIMEOUT)

    queues = {queue["name"]: queue["messages"] for queue in lengths}
    assert waiting_fleet.url in shown
    assert queues["fake"] == 5
    assert queues.keys() >= {"vllm", "deepspeed", "onnx", "pytorch", "control"}


def test_purge_empties_tenants_lanes(waiting_fleet):
    """It says how many it took, and nothing is left of them; what comes then is served in its turn."""
    process = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "workers", "purge", "-f", "-Q", "fake"], cwd=ROOT,
        env=waiting_fleet.environ, capture_output=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip

    broker = waiting_fleet.client._redis
    assert b"Purged 5 messages from 1 known task queue." in process.stdout
    assert waiting_fleet.client.queue_lengths()["fake"] == 0
    assert broker.keys("muai:lane*") == []
    assert broker.hmget(keys.queue_state("fake"), "laned", "bytes") == [None, None]
    waiting_fleet.start_worker()
    again = waiting_fleet.client.submit(model="echo", inputs={"prompt": "ab"}, tenant="acme")
    assert again.result(TIMEOUT).text == "ba"


def test_remote_control_says_the_truth(make_fleet):
    """What runs is shown with host and process; what does not happen is an error; events stop when they are said to."""
    fleet = make_fleet(optimization={"fake": {"latency_ms": 2000}})
    worker = fleet.start_worker()
    app = create_app(load_settings(fleet.config, {"REDIS_URL": fleet.url}))
    control = app.control
    seen: list[str] = []

    def watch() -> None:
        with app.connection_for_read() as connection:
            receiver = app.events.Receiver(connection, handlers={"*": lambda event: seen.append(event["type"])})
            for _ in receiver.itercapture(timeout=20, wakeup=False):
                if done.is_set():
                    return

    done = threading.Event()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    eventually(lambda: "worker-heartbeat" in seen, TIMEOUT, "the first events")
    handle = fleet.client.submit(model="echo", inputs={"prompt": "ab"})

    ((name, running),) = eventually(
        lambda: [pair for pair in (control.inspect(timeout=2, limit=1).active() or {}).items() if pair[1]],
        TIMEOUT, "what runs",
    )  # fmt: skip
    assert (running[0]["hostname"], running[0]["worker_pid"]) == (name, worker.pid)
    assert "error" in control.pool_grow(2, reply=True, limit=1, timeout=5)[0][name]
    assert "error" in control.autoscale(4, 1, reply=True, limit=1, timeout=5)[0][name]
    handle.result(TIMEOUT)
    eventually(lambda: "task-succeeded" in seen, TIMEOUT, "its events")

    assert control.disable_events(reply=True, limit=1, timeout=5) == [{name: {"ok": "task events disabled"}}]
    seen.clear()
    fleet.client.submit(model="echo", inputs={"prompt": "cd"}).result(TIMEOUT)
    eventually(lambda: seen.count("worker-heartbeat") >= 2, TIMEOUT, "heartbeats")
    assert {event for event in seen if event.startswith("task-")} == set()
    assert control.enable_events(reply=True, limit=1, timeout=5) == [{name: {"ok": "task events enabled"}}]
    fleet.client.submit(model="echo", inputs={"prompt": "ef"}).result(TIMEOUT)
    eventually(lambda: "task-succeeded" in seen, TIMEOUT, "events again")
    done.set()


def test_a_worker_refuses_what_it_would_not_do(make_fleet):
    """Another pool and autoscaling are one line; what has no effect is warned of."""
    fleet = make_fleet()
    command = [sys.executable, "-m", "celery", "-A", "workers", "worker", "-Q", "fake"]
    for options in (("-P", "prefork"), ("-P", "threads"), ("--autoscale", "4,1")):
        process = subprocess.run(
            [*command, *options], cwd=ROOT, env=fleet.environ, capture_output=True, timeout=TIMEOUT, check=False
        )
        assert process.returncode == 64
        assert process.stderr.decode().startswith(f"Error: {options[0]}")
        assert process.stderr.count(b"\n") == 1
