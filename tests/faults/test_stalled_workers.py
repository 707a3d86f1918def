"""Workers that stand still, are stopped or die while they hold requests: who keeps them, and who answers."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import redis

from shared import keys
from tests.support.fleet import FleetUnderTest
from tests.support.requests import ECHO
from tests.support.waiting import eventually
from workers.engines.fake import CHUNKS

LEASE = 0.6
FLEET = {"lease_seconds": LEASE, "sweep_seconds": 0.2, "heartbeat_seconds": 0.2}

HOLDS_THE_INTERPRETER = f"""
import ctypes, os, time
nap, hold = time.sleep, ctypes.PyDLL(None).usleep
def sleep(seconds):
    if seconds < {LEASE / 2}:
        return nap(seconds)
    with open(os.environ["RUNS"], "a") as runs:
        runs.write("run ")
    hold(int({CHUNKS} * seconds * 1e6))  # in one piece, not part by part as the engine does
time.sleep = sleep
"""


@pytest.fixture
def stalls(tmp_path: Path) -> dict[str, str]:
    """An environment in which a batch of more than a lease is a native call that holds the interpreter's lock."""
    (tmp_path / "sitecustomize.py").write_text(HOLDS_THE_INTERPRETER)
    (tmp_path / "runs").touch()
    return {"PYTHONPATH": str(tmp_path), "RUNS": str(tmp_path / "runs")}


def keeper_of(worker: subprocess.Popen[bytes]) -> psutil.Process:
    """The process that keeps a worker's leases."""
    children = psutil.Process(worker.pid).children()
    return next(child for child in children if child.cmdline()[-1] == "workers.broker.lease_process")


def leased(client: redis.Redis) -> dict[str, float]:
    """When each lease expires, in seconds since the epoch."""
    return {lease.decode(): ms / 1000 for lease, ms in client.zrange(keys.LEASE_INDEX, 0, -1, withscores=True)}


def test_a_stalled_interpreter_loses_no_lease(make_fleet, stalls, redis_client: redis.Redis) -> None:
    """A native call that holds the interpreter for four leases: the request runs once, and nobody takes it over."""
    fleet: FleetUnderTest = make_fleet(fleet=FLEET, optimization={"fake": {"latency_ms": 4000 * LEASE}})
    for _ in range(2):
        fleet.start_worker(environ=stalls)

    result = fleet.client.submit(ECHO).result(20)

    assert result.text == "olleh"
    assert Path(stalls["RUNS"]).read_text() == "run "
    assert not any("expired leases" in fleet.log(process) for process in fleet.processes)


def test_a_deadline_ends_the_lease_of_a_stalled_worker(make_fleet, stalls, redis_client: redis.Redis) -> None:
    """Another worker tells its caller while the stalled one, which cannot, still stands."""
    fleet = make_fleet(fleet=FLEET, optimization={"fake": {"latency_ms": 600_000}})
    stalled = fleet.start_worker(environ=stalls)
    handle = fleet.client.submit(ECHO, timeout=2)
    eventually(lambda: "run" in Path(stalls["RUNS"]).read_text(), what="a stall")
    fleet.start_worker()

    record = eventually(lambda: redis_client.get(keys.result_key(handle.id)), what="the end of the request")

    assert b"DeadlineExceeded" in record
    assert keeper_of(stalled).is_running()
    stalled.kill()


def test_a_killed_workers_requests_are_answered_by_the_other_at_once(make_fleet, redis_client: redis.Redis) -> None:
    """After SIGKILL the process beside it gives its leases back, counted, and ends: nobody waits for them to lapse."""
    fleet = make_fleet(fleet={**FLEET, "lease_seconds": 120.0}, optimization={"fake": {"latency_ms": 1500}})
    for _ in range(2):
        fleet.start_worker()
    handle = fleet.client.submit(ECHO)
    holder = eventually(lambda: next((one.pid for one in fleet.client.fleet() if one.in_flight), None), what="a holder")
    killed = next(process for process in fleet.processes if process.pid == holder)
    keeper = keeper_of(killed)

    killed.kill()

    assert handle.result(30).text == "olleh"
    eventually(lambda: not keeper.is_running(), what="the end of its process")
    assert "the worker is gone: the 1 leases it held are given back" in fleet.log(killed)
    other = next(process for process in fleet.processes if process is not killed)
    assert "1 expired leases taken over: 1 back in their queues" in fleet.log(other)


def test_a_worker_that_dies_with_the_process_beside_it_leaves_its_leases_to_lapse(make_fleet, redis_client) -> None:
    """As where a machine dies: they expire within one length, and the message is back in its queue."""
    fleet = make_fleet(fleet={**FLEET, "lease_seconds": 3.0}, optimization={"fake": {"latency_ms": 60_000}})
    worker = fleet.start_worker()
    fleet.client.submit(ECHO)
    eventually(lambda: leased(redis_client), what="a lease")
    keeper = keeper_of(worker)

    keeper.kill()
    worker.kill()
    killed = time.time()

    eventually(lambda: not keeper.is_running(), what="the end of its process")
    (expiry,) = leased(redis_client).values()
    assert expiry <= killed + 3.1
    fleet.start_worker("control")
    eventually(lambda: fleet.client.queue_lengths()["fake"] == 1, what="the redelivery")


@pytest.mark.parametrize(
    ("optimization", "prompt"),
    [
        pytest.param({"fake": {"latency_ms": 2500}}, "hello", id="running"),
        pytest.param({"batcher": {"adaptive_batching": False, "batch_timeout_ms": 2500}}, "hello", id="waiting"),
        pytest.param({"retry": {"backoff_ms": 2500}}, "!busy once", id="resting"),
    ],
)
def test_a_stopped_worker_keeps_nothing(make_fleet, redis_client: redis.Redis, optimization, prompt: str) -> None:
    """SIGSTOP: its request is taken over and answered by the other. Woken, it drops the request at once."""
    fleet = make_fleet(fleet=FLEET, optimization=optimization)
    for _ in range(2):
        fleet.start_worker()
    handle = fleet.client.submit({**ECHO, "inputs": {"prompt": prompt}})

    def holder() -> int | None:
        return next((worker.pid for worker in fleet.client.fleet() if worker.in_flight), None)

    stopped = next(process for process in fleet.processes if process.pid == eventually(holder, what="a holder"))
    (other,) = (process for process in fleet.processes if process is not stopped)

    stopped.send_signal(signal.SIGSTOP)
    eventually(lambda: "1 back in their queues" in fleet.log(other), what="the redelivery")
    eventually(lambda: leased(redis_client), what="a lease of the other")
    stopped.send_signal(signal.SIGCONT)

    eventually(lambda: "1 leases were lost to other workers" in fleet.log(stopped), what="the news")
    assert handle.result(20).metadata["worker"].split("-")[-2] == str(other.pid)
    eventually(lambda: not any(worker.in_flight for worker in fleet.client.fleet()), what="idle workers")
    assert redis_client.hlen(keys.LEASE_MESSAGES) == 0


def test_a_draining_worker_keeps_its_leases(make_fleet, redis_client: redis.Redis) -> None:
    """A signal to worker and process alike, as from a terminal: what runs for four leases more is answered once."""
    fleet = make_fleet(fleet=FLEET, optimization={"fake": {"latency_ms": 4000 * LEASE}})
    draining = fleet.start_worker()
    fleet.start_worker("control")
    handle = fleet.client.submit(ECHO)
    eventually(lambda: leased(redis_client), what="a lease")
    keeper = keeper_of(draining)

    draining.terminate()
    keeper.terminate()

    assert handle.result(20).text == "olleh"
    assert draining.wait(20) == 0
    assert not keeper.is_running()
    assert "expired leases" not in fleet.log(fleet.processes[1])
