"""The fleet on a broker behind a socket, and on one that sentinels name: all of its parts, and a failover."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
import yaml
from celery import chord

from shared.embedded import EmbeddedBroker, free_port, server_binary
from shared.settings_loader import load_settings
from tests.support.fleet import FAKE, ROOT, FleetUnderTest
from tests.support.shell import TIMEOUT, muai
from tests.support.waiting import eventually
from workers.celery import create_app

PASSWORD = "of-the-sentinels"  # noqa: S105  # of a test


@contextmanager
def sentinel(folder: Path, master: EmbeddedBroker) -> Iterator[int]:
    """A sentinel that watches a broker; its port."""
    port = free_port()
    config = folder / "sentinel.conf"
    config.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {folder}\nlogfile sentinel.log\nrequirepass {PASSWORD}\n"
        f"sentinel monitor fleet 127.0.0.1 {master.port} 1\n"
        "sentinel down-after-milliseconds fleet 1000\nsentinel failover-timeout fleet 3000\n"
    )
    process = subprocess.Popen([server_binary(), str(config), "--sentinel"], stdout=subprocess.DEVNULL)
    try:
        yield port
    finally:
        process.kill()
        process.wait()


@contextmanager
def fleet_on(url: str, folder: Path) -> Iterator[FleetUnderTest]:
    """A fleet with this URL."""
    config = folder / "fleet.yaml"
    config.write_text(yaml.safe_dump(FAKE))
    fleet = FleetUnderTest(url, folder, config)
    try:
        yield fleet
    finally:
        fleet.stop()


def all_parts_work(fleet: FleetUnderTest) -> None:
    """Client, worker with its lease process, bare tasks, chords, remote control, beat and the command line."""
    worker = fleet.start_worker()
    app = create_app(load_settings(fleet.config, {"REDIS_URL": fleet.url}))
    call = app.signature("muai.infer", kwargs={"request": {"model": "echo", "inputs": {"prompt": "abc"}}}, queue="fake")
    body = app.signature("muai.infer", kwargs={"request": {"model": "echo"}}, queue="fake")

    assert muai(fleet, "submit", "-m", "echo", "abc") == (0, "cba\n", "")
    assert fleet.client.submit(model="echo", inputs={"prompt": "abc"}).result(TIMEOUT).text == "cba"
    assert call.apply_async().get(timeout=TIMEOUT)["outputs"]["text"] == "cba"
    assert chord([call, call], body).apply_async().get(timeout=TIMEOUT)["outputs"]["text"] == "abc\nabc"
    assert len(app.control.inspect(timeout=5, limit=1).ping()) == 1
    doctor = muai(fleet, "doctor")
    assert doctor[0] == 0, doctor[1]
    assert "workers: 1 alive, serving echo" in doctor[1]
    beat = subprocess.Popen(
        [sys.executable, "-m", "celery", "-A", "workers", "beat", "--schedule", str(fleet.folder / "beat")], cwd=ROOT,
        env=fleet.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        eventually(lambda: fleet.client.queue_lengths()["control"] > 0, TIMEOUT, "what beat sends")
    finally:
        beat.kill()
        beat.wait()
    log = fleet.log(worker)
    assert "the process that keeps leases" not in log
    assert "cannot keep leases" not in log


@pytest.mark.parametrize("spelling", ["unix://{path}?db=2", "redis+socket://{path}?virtual_host=2"])
def test_a_fleet_runs_through_a_socket(tmp_path, spelling):
    """In either spelling, with a database of its own."""
    path = tmp_path / "s"
    with EmbeddedBroker(tmp_path / "broker", options={"unixsocket": str(path)}) as broker:
        with fleet_on(spelling.format(path=path), tmp_path) as fleet:
            all_parts_work(fleet)
        with redis.Redis(port=broker.port) as client:
            assert "db0" not in client.info("keyspace")


def test_a_fleet_follows_its_sentinels(tmp_path):
    """All parts ask them, those that do not answer passed over; after a failover everybody is on the new master."""
    with (
        EmbeddedBroker(tmp_path / "one") as one,
        EmbeddedBroker(tmp_path / "two", options={"replicaof": f"127.0.0.1 {one.port}"}) as two,
        sentinel(tmp_path, one) as port,
    ):
        with redis.Redis(port=port, password=PASSWORD) as watcher:
            eventually(lambda: watcher.sentinel_slaves("fleet"), TIMEOUT, "the sentinel's knowledge of the replica")
        hosts = f"127.0.0.1:{free_port()},127.0.0.1:{port}"
        url = f"sentinel://{hosts}/2?master_name=fleet&sentinel_password={PASSWORD}"
        with fleet_on(url, tmp_path) as fleet:
            all_parts_work(fleet)

            one.kill()
            killed = time.monotonic()
            with redis.Redis(port=two.port) as new:
                eventually(lambda: new.info("replication")["role"] == "master", TIMEOUT, "the failover")
            eventually(lambda: muai(fleet, "submit", "-m", "echo", "def")[0] == 0, TIMEOUT, "an answer afterwards")
            assert fleet.client.submit(model="echo", inputs={"prompt": "def"}).result(TIMEOUT).text == "fed"
            assert time.monotonic() - killed < TIMEOUT


def test_a_worker_with_a_wrong_address_says_one_line(tmp_path):
    """A bad database or port ends it at its start."""
    for url in ("redis://127.0.0.1:1/abc", "redis://127.0.0.1:none/0", "sentinel://127.0.0.1:1"):
        with fleet_on(url, tmp_path) as fleet:
            process = subprocess.run(
                [sys.executable, "-m", "celery", "-A", "workers", "worker", "-Q", "fake"], cwd=ROOT, env=fleet.environ,
                capture_output=True, timeout=TIMEOUT, check=False,
            )  # fmt: skip

        assert process.returncode == 64
        assert process.stderr.decode().startswith(f"Error: fleet.redis_url: '{url}' cannot be read: ")
        assert process.stderr.count(b"\n") == 1
