"""The embedded broker: a real server, on loopback, that comes back with its data and leaves nothing."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest
import redis

from producer.cli.exits import Exit
from shared.embedded import EmbeddedBroker
from shared.errors import BrokerUnavailable
from tests.support.processes import environment, run_module
from tests.support.waiting import eventually


def test_it_answers_on_loopback_and_is_gone_afterwards(tmp_path: Path) -> None:
    """Inside the block it answers; after it the process is gone."""
    with EmbeddedBroker(tmp_path) as broker:
        pid = broker.pid
        assert redis.Redis.from_url(broker.url).ping()
        listening = {c.laddr.ip for c in psutil.Process(pid).net_connections() if c.status == "LISTEN"}

    assert listening == {"127.0.0.1"}
    assert not psutil.pid_exists(pid)


def test_killed_it_comes_back_on_its_port_with_its_data(tmp_path: Path) -> None:
    """With the append-only file a SIGKILL loses nothing that was flushed, and clients find it where it was."""
    with EmbeddedBroker(tmp_path, append_only=True) as broker:
        client = redis.Redis.from_url(broker.url)
        client.set("kept", "value")
        eventually(lambda: client.info("persistence")["aof_pending_bio_fsync"] == 0)
        port = broker.port

        broker.kill()
        broker.start()

        assert broker.port == port
        assert redis.Redis.from_url(broker.url).get("kept") == b"value"


def test_a_port_that_is_taken_is_one_clear_error(tmp_path: Path) -> None:
    """Asked for a port that somebody has, it says so and how to choose another."""
    with EmbeddedBroker(tmp_path / "first") as first:
        with pytest.raises(BrokerUnavailable, match=f"cannot have port {first.port}: something else listens there"):
            EmbeddedBroker(tmp_path / "second", port=first.port).start()

        assert redis.Redis.from_url(first.url).ping()


def test_a_directory_is_one_brokers_alone(tmp_path: Path) -> None:
    """Another process that asks for it is refused by name, until it is free again: two would write into one file."""
    command = ["producer.cli", "broker", "--directory", str(tmp_path), "--port", "0"]
    with EmbeddedBroker(tmp_path, append_only=True) as broker:
        broker.kill()
        broker.start()
        refused = run_module(command, environment(), 60)

    assert refused.returncode == Exit.OUTAGE
    assert f"another embedded broker (of process {os.getpid()}) has its data in {tmp_path}" in refused.stderr
    with EmbeddedBroker(tmp_path, append_only=True) as broker:
        assert redis.Redis.from_url(broker.url).ping()
