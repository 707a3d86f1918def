"""The process that keeps leases, on a real broker."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import redis

from shared import keys
from shared.embedded import EmbeddedBroker
from shared.settings import FleetSettings
from tests.support.waiting import eventually
from workers.broker.lease_table import FIRST_SLOTS
from workers.broker.leases import LeaseKeeper

LEASE = 0.9


@pytest.fixture
def make_keeper(broker: EmbeddedBroker) -> Iterator[Callable[..., LeaseKeeper]]:
    """Makes keepers whose process is there: ``make_keeper(stall_seconds=1)``."""
    with ExitStack() as stack:

        def make(*held: str, **changes: object) -> LeaseKeeper:
            keeper = LeaseKeeper(FleetSettings(**{"redis_url": broker.url, "lease_seconds": LEASE, **changes}))
            stack.callback(keeper.close)
            for lease in held:
                keeper.hold(lease)
            if not held:
                keeper.start()
            keeper.wait()
            return keeper

        yield make


def claim(client: redis.Redis, *leases: str) -> float:
    """Lease as a claim does; returns when the leases expire, in ms since the epoch."""
    expiry = time.time() * 1000 + LEASE * 1000
    client.zadd(keys.LEASE_INDEX, dict.fromkeys(leases, expiry))
    return expiry


def expiries(client: redis.Redis) -> dict[str, float]:
    """When each lease expires, in ms since the epoch."""
    return {lease.decode(): expiry for lease, expiry in client.zrange(keys.LEASE_INDEX, 0, -1, withscores=True)}


def process_of(keeper: LeaseKeeper) -> psutil.Process | None:
    """The process of a keeper."""
    for child in psutil.Process().children():
        if child.is_running() and keeper._process is not None and child.pid == keeper._process.pid:
            return child
    return None


def test_what_is_held_is_kept_and_what_is_released_lapses(make_keeper, redis_client: redis.Redis) -> None:
    """Whatever its id looks like, and however many are held."""
    keeper = make_keeper()
    leases = [f"{number}@tenant" if number % 2 else f"{number}" for number in range(3 * FIRST_SLOTS)]
    claimed = claim(redis_client, *leases, "nobody's")
    for lease in leases:
        keeper.hold(lease)
    keeper.release(leases[5:10])

    eventually(lambda: expiries(redis_client)[leases[0]] > claimed + 2 * LEASE * 1000, what="renewals")

    after = expiries(redis_client)
    kept = {lease for lease, expiry in after.items() if expiry > claimed}
    assert kept == set(leases) - set(leases[5:10])
    assert keeper.tend() == set()


def test_a_lease_is_kept_no_longer_than_its_deadline(make_keeper, redis_client: redis.Redis) -> None:
    """The last renewal ends with the deadline, to the ms."""
    keeper = make_keeper()
    claimed = claim(redis_client, "1", "2")
    deadline = claimed / 1000 + LEASE
    keeper.hold("1")
    keeper.hold("1", deadline)
    keeper.hold("2", 1e300)

    eventually(lambda: expiries(redis_client)["2"] > deadline * 1000 + 1000, what="renewals")

    assert expiries(redis_client)["1"] == int(deadline * 1000)


def test_a_lost_lease_is_told_once_and_never_taken_back(make_keeper, redis_client: redis.Redis) -> None:
    """What another worker has taken over is not renewed; what was settled and released meanwhile is not lost."""
    keeper = make_keeper()
    claim(redis_client, "1", "2")
    keeper.hold("1")
    keeper.hold("2")
    redis_client.zrem(keys.LEASE_INDEX, "1")

    assert eventually(keeper.tend, what="the news") == {"1"}

    claimed = claim(redis_client, "2")
    eventually(lambda: expiries(redis_client)["2"] > claimed, what="a renewal")
    assert keeper.tend() == set()
    assert expiries(redis_client).keys() == {"2"}


def test_without_a_sign_of_life_leases_lapse(make_keeper, redis_client: redis.Redis) -> None:
    """A stalled worker keeps what it holds for stall_seconds; when its loop goes on, it keeps what it still has."""
    keeper = make_keeper(stall_seconds=1.5)
    claim(redis_client, "1")
    signed = time.time() * 1000
    keeper.tend()
    keeper.hold("1")

    eventually(lambda: expiries(redis_client)["1"] < time.time() * 1000, what="the end of the lease")

    lapsed = expiries(redis_client)["1"]
    assert signed + 1000 < lapsed
    keeper.tend()
    eventually(lambda: expiries(redis_client)["1"] > lapsed, what="a renewal")


def test_a_process_that_is_killed_is_started_again(make_keeper, redis_client: redis.Redis, caplog) -> None:
    """The loop notices, says so, and nothing that is held is lost."""
    keeper = make_keeper(lease_seconds=6)
    claim(redis_client, "1")
    keeper.hold("1")
    killed = process_of(keeper)
    killed.kill()

    def kept() -> bool:
        keeper.tend()
        return process_of(keeper) not in (None, killed) and expiries(redis_client)["1"] > time.time() * 1000 + 3000

    eventually(kept, what="a renewal by another process")

    assert [record.getMessage() for record in caplog.records if record.name == "workers.broker.leases"] == [
        "the process that keeps leases ended (-9); it is started again"
    ]


def test_signals_are_the_workers_to_heed(make_keeper, redis_client: redis.Redis) -> None:
    """A signal to the whole group ends no lease while the worker drains; the end of the worker's use does."""
    keeper = make_keeper()
    process = process_of(keeper)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        process.send_signal(number)
    claimed = claim(redis_client, "1")
    keeper.hold("1")

    eventually(lambda: expiries(redis_client)["1"] > claimed + 2 * LEASE * 1000, what="renewals")

    keeper.close()
    assert not process.is_running()


def test_a_broker_that_comes_back_finds_leases_kept_soon(tmp_path: Path, make_keeper) -> None:
    """A renewal that fails is tried again after a second, not after a third of the lease; no secret is to be seen."""
    with EmbeddedBroker(tmp_path / "own", append_only=True) as own, redis.Redis.from_url(own.url) as client:
        claimed = claim(client, "1")
        own.kill()
        keeper = make_keeper("1", redis_url=own.url.replace("://", "://default:hunter2@"), lease_seconds=600)
        own.start()

        eventually(lambda: expiries(client)["1"] > claimed, what="a renewal")

        assert "hunter2" not in " ".join(process_of(keeper).cmdline())
        keeper.close()
