"""Workers die at random while requests flow: every request gets its one right answer, and nothing is left behind."""

from __future__ import annotations

import random
import signal
import threading

import pytest
import redis

from shared import keys
from tests.conftest import FleetUnderTest, eventually

REQUESTS = 6000
WORKERS = 3


@pytest.mark.timeout(170)
def test_random_kills_and_stops_lose_and_double_nothing(make_fleet, redis_client: redis.Redis) -> None:
    """SIGKILL, SIGTERM and freeze-then-kill at random instants, a new worker for each: all answered, each once."""
    fleet: FleetUnderTest = make_fleet(
        fleet={"lease_seconds": 1.5, "sweep_seconds": 0.3, "max_deliveries": 50},
        optimization={"fake": {"latency_ms": 3, "per_item_ms": 1}},
    )
    for _ in range(WORKERS):
        fleet.start_worker(wait=False)
    for process in fleet.processes:
        fleet.wait_live(process)
    rng = random.Random(5)
    done = threading.Event()
    hits: list[str] = []

    def strike() -> None:
        while not done.wait(rng.uniform(0.3, 0.9)):
            victim = fleet.processes[-rng.randint(1, WORKERS)]
            how = rng.choice(("kill", "terminate", "freeze"))
            if victim.poll() is None:
                if how == "freeze":
                    victim.send_signal(signal.SIGSTOP)
                    done.wait(0.3)
                (victim.terminate if how == "terminate" else victim.kill)()
                hits.append(how)
            fleet.start_worker(wait=False)

    striker = threading.Thread(target=strike)
    striker.start()
    try:
        requests = ({"model": "echo", "inputs": {"prompt": str(number)}} for number in range(REQUESTS))
        texts = [result.text for result in fleet.client.map(requests, window=200)]
    finally:
        done.set()
        striker.join()

    assert texts == [str(number)[::-1] for number in range(REQUESTS)]
    assert hits
    eventually(lambda: redis_client.zcard(keys.LEASE_INDEX) == 0, 15, "the end of all leases")
    assert redis_client.xlen(keys.DEAD_LETTERS) == 0
