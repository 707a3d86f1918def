"""How a worker stops: by which signal, in which state, and what becomes of its requests."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import redis

from shared import keys
from shared.embedded import EmbeddedBroker
from tests.support.fleet import FleetUnderTest
from tests.support.requests import ECHO
from tests.support.waiting import eventually

HANGS = {"fake": {"latency_ms": 600_000}}
"""An engine that never comes back: as far as the rest of the process can tell, a native call that hangs."""

SLACK = 30.0
"""Seconds after its grace in which a worker must be gone, on a machine that is busy with other things.

Half of the longest grace here: a worker that waited for its engine would take longer.
"""


@pytest.fixture
def own_broker(tmp_path: Path) -> Iterator[EmbeddedBroker]:
    """A broker that a test may kill and freeze."""
    with EmbeddedBroker(tmp_path / "own-broker", append_only=True) as own:
        yield own


def grace(seconds: float) -> dict[str, object]:
    return {"server": {"graceful_shutdown_timeout": seconds}}


def gone_within(process: subprocess.Popen[bytes], seconds: float) -> int:
    """The exit status of a process that ends in time."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"the worker still runs after {seconds} s") from None


def running(fleet: FleetUnderTest, count: int) -> None:
    eventually(lambda: fleet.client.queue_lengths()["leased"] == count, what=f"{count} requests in the worker's hands")


def noticed(fleet: FleetUnderTest, worker: subprocess.Popen[bytes], name: str) -> bool:
    return worker.poll() is not None or f"worker: {name}" in fleet.log(worker)


def untouched(fleet: FleetUnderTest, client: redis.Redis, count: int) -> None:
    """So many requests wait again, none is leased, none is dead, and none counts as delivered."""
    lengths = fleet.client.queue_lengths()
    assert (lengths["fake"], lengths["leased"], lengths["dead"]) == (count, 0, 0)
    assert not any(b"deliveries" in message for message in client.lrange("fake", 0, -1))


# Requirements: 8.5
def test_sigterm_finishes_what_runs_and_leaves_the_rest(make_fleet, redis_client: redis.Redis) -> None:
    """The running batch is answered, what waits stays in the queue, and the next worker answers that."""
    fleet = make_fleet(optimization={"fake": {"latency_ms": 800}, "batcher": {"max_batch_size": 2}})
    first = fleet.start_worker()
    handles = fleet.client.submit_many([ECHO] * 6)
    running(fleet, 2)

    first.terminate()

    assert gone_within(first, SLACK) == 0
    assert [handle.result(1).text for handle in handles[:2]] == ["olleh"] * 2
    untouched(fleet, redis_client, 4)
    assert fleet.client.fleet() == []
    fleet.start_worker()
    assert [handle.result(10).text for handle in handles] == ["olleh"] * 6


@pytest.mark.parametrize(
    ("signals", "status"),
    [
        ((signal.SIGTERM, signal.SIGTERM), 0),
        ((signal.SIGINT, signal.SIGTERM), 1),
        ((signal.SIGQUIT,), 1),
    ],
)
def test_a_second_signal_or_sigquit_gives_back_what_runs(
    make_fleet, redis_client: redis.Redis, signals: tuple[signal.Signals, ...], status: int
) -> None:
    """The process does not wait for its engine any longer: its requests are back in the queue, uncounted."""
    fleet = make_fleet(optimization=HANGS, monitoring=grace(60))
    worker = fleet.start_worker()
    fleet.client.submit_many([ECHO] * 3)
    running(fleet, 3)

    for number in signals:
        worker.send_signal(number)
        eventually(partial(noticed, fleet, worker, number.name), what="the signal's notice")

    assert gone_within(worker, SLACK) == status
    untouched(fleet, redis_client, 3)


def test_an_engine_that_gives_up_while_its_worker_stops_fails_nothing(make_fleet, redis_client: redis.Redis) -> None:
    """A passing error of a stopping worker's engine says nothing of the request, which goes back."""
    fleet = make_fleet(optimization={"fake": {"latency_ms": 800}})
    worker = fleet.start_worker()
    handle = fleet.client.submit({**ECHO, "inputs": {"prompt": "!busy once"}})
    running(fleet, 1)

    worker.terminate()

    assert gone_within(worker, SLACK) == 0
    untouched(fleet, redis_client, 1)
    fleet.start_worker()
    assert handle.result(10).text == "ecno ysub!"


def test_an_engine_that_hangs_keeps_nobody(make_fleet, redis_client: redis.Redis) -> None:
    """After the grace the requests go back and the process ends, though its engine's thread never returns."""
    fleet = make_fleet(optimization=HANGS, monitoring=grace(1))
    worker = fleet.start_worker()
    fleet.client.submit(ECHO)
    running(fleet, 1)

    worker.terminate()

    assert gone_within(worker, 1 + SLACK) == 0
    untouched(fleet, redis_client, 1)


def test_a_worker_that_loads_its_models_stops_at_once(make_fleet, redis_client: redis.Redis) -> None:
    """SIGTERM during a long load ends the process without waiting for it."""
    fleet = make_fleet(optimization={"fake": {"load_ms": 600_000}}, monitoring={"server": {"preload_models": ["echo"]}})
    worker = fleet.start_worker(wait=False)
    eventually(lambda: "[queues]" in fleet.log(worker), what="the banner")

    worker.terminate()

    assert gone_within(worker, SLACK) == 0


def test_a_worker_that_finds_no_broker_stops_at_once(make_fleet) -> None:
    """SIGTERM while it tries to connect ends the process."""
    fleet = make_fleet()
    fleet.url = "redis://127.0.0.1:1/0"
    worker = fleet.start_worker(wait=False)
    eventually(lambda: "Cannot connect" in fleet.log(worker), what="a try to connect")

    worker.terminate()

    assert gone_within(worker, SLACK) == 0


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_a_broker_that_is_gone_keeps_nobody(make_fleet, own_broker: EmbeddedBroker, how: str) -> None:
    """The process ends after its grace; the requests come back with their leases when the broker does."""
    fleet = make_fleet(optimization=HANGS, monitoring=grace(2), fleet={"lease_seconds": 2, "sweep_seconds": 0.2})
    fleet.url = own_broker.url
    worker = fleet.start_worker()
    fleet.client.submit(ECHO)
    running(fleet, 1)
    if how == "killed":
        own_broker.kill()
    else:
        own_broker.send_signal(signal.SIGSTOP)

    try:
        worker.terminate()
        assert gone_within(worker, 2 + SLACK) == 0
    finally:
        if how == "killed":
            own_broker.start()
        else:
            own_broker.send_signal(signal.SIGCONT)
    fleet.client.queue_lengths()


def test_a_broker_that_comes_back_within_the_grace_gets_the_outcomes(make_fleet, own_broker: EmbeddedBroker) -> None:
    """What ended while the broker was away is written before the worker goes: nothing runs twice."""
    fleet = make_fleet(optimization={"fake": {"latency_ms": 700}}, monitoring=grace(15))
    fleet.url = own_broker.url
    worker = fleet.start_worker()
    handle = fleet.client.submit(ECHO)
    running(fleet, 1)

    own_broker.kill()
    worker.terminate()
    eventually(lambda: "away while this worker stops" in fleet.log(worker))
    own_broker.start()

    assert gone_within(worker, SLACK) == 0
    assert handle.result(5).text == "olleh"


# Requirements: 8.5
@pytest.mark.timeout(120)
def test_a_rolling_restart_under_load_loses_and_fails_nothing(make_fleet, redis_client: redis.Redis) -> None:
    """Each worker is replaced while requests flow: all are answered, each once, and no delivery counts."""
    fleet = make_fleet(optimization={"fake": {"latency_ms": 10, "per_item_ms": 2}, "batcher": {"max_batch_size": 8}})
    for _ in range(2):
        fleet.start_worker()
    stopped: list[int] = []
    total = 1200
    requests = ({"model": "echo", "inputs": {"prompt": str(number)}} for number in range(total))
    texts: list[str] = []

    for result in fleet.client.map(requests, window=100):
        texts.append(result.text)
        if len(texts) % 300 == 0:
            old = fleet.processes[len(stopped)]
            fleet.start_worker()
            old.terminate()
            stopped.append(gone_within(old, SLACK))

    assert texts == [str(number)[::-1] for number in range(total)]
    assert stopped == [0] * len(stopped)
    assert len(stopped) == 4
    eventually(lambda: redis_client.zcard(keys.LEASE_INDEX) == 0, what="the end of all leases")
    assert redis_client.xlen(keys.DEAD_LETTERS) == 0
