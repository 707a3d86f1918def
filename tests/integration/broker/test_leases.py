"""The process that keeps leases, on a real broker."""

from __future__ import annotations

import signal
import subprocess
import sys
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
from tests.support.fleet import ROOT
from tests.support.waiting import eventually
from workers.broker.keeping import RESTART_SECONDS
from workers.broker.lease_table import FIRST_SLOTS
from workers.broker.leases import LeaseKeeper

LEASE = 0.9
MINE = "0123456789"
"""What the leases of the process under test are known by."""


@pytest.fixture
def make_keeper(broker: EmbeddedBroker) -> Iterator[Callable[..., LeaseKeeper]]:
    """Makes keepers whose process is there: ``make_keeper(stall_seconds=1)``."""
    with ExitStack() as stack:

        def make(*held: str, **changes: object) -> LeaseKeeper:
            keeper = LeaseKeeper(FleetSettings(**{"redis_url": broker.url, "lease_seconds": LEASE, **changes}), MINE)
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
        if child.is_running() and child.pid == keeper.process.pid:
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

    assert [record.getMessage() for record in caplog.records if record.name == "workers.broker.keeping"] == [
        "the process that keeps leases ended (-9); another is started"
    ]


def test_a_process_that_is_frozen_is_replaced_in_time(make_keeper, redis_client: redis.Redis, caplog) -> None:
    """A SIGSTOP of it is noticed within two looks of the loop, and said; nothing that is held lapses."""
    keeper = make_keeper(lease_seconds=6)
    claim(redis_client, "1")
    keeper.hold("1")
    time.sleep(RESTART_SECONDS)
    frozen = process_of(keeper)
    frozen.suspend()
    stood = time.monotonic()

    def kept() -> bool:
        time.sleep(0.1)
        assert keeper.tend() == set()
        return process_of(keeper) not in (None, frozen) and expiries(redis_client)["1"] > time.time() * 1000 + 3000

    eventually(kept, what="a renewal by another process")

    assert time.monotonic() - stood < 6
    assert not frozen.is_running()
    assert [record.getMessage() for record in caplog.records if record.name == "workers.broker.keeping"] == [
        "the process that keeps leases stands still (-9); another is started"
    ]


def test_a_process_that_says_nothing_is_replaced(make_keeper, caplog) -> None:
    """It does not run though nobody has stopped it: it has not done what it does every second."""
    keeper = make_keeper()
    first = process_of(keeper)
    time.sleep(RESTART_SECONDS)
    keeper.table.promise(-1.0)
    assert keeper.tend() == set()
    keeper.table.promise(-1.0)

    assert keeper.tend() == set()

    assert process_of(keeper) not in (None, first)


def test_one_that_was_late_once_is_left_alone(make_keeper) -> None:
    """The loop itself may have stood still as well, as where the machine was suspended."""
    keeper = make_keeper()
    first = process_of(keeper)
    time.sleep(RESTART_SECONDS)
    keeper.table.promise(-1.0)
    keeper.tend()
    keeper.table.promise(1.0)
    keeper.tend()
    keeper.table.promise(-1.0)
    keeper.tend()

    assert process_of(keeper) == first


HOLDER = """
import sys, time
from shared.settings import FleetSettings
from workers.broker.leases import LeaseKeeper
keeper = LeaseKeeper(FleetSettings(redis_url=sys.argv[1], lease_seconds=30), sys.argv[2])
keeper.hold("1-abc0")
keeper.wait()
print(keeper.process.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def start_holder(broker: EmbeddedBroker) -> Iterator[Callable[..., tuple[subprocess.Popen[str], psutil.Process]]]:
    """Starts processes that hold leases: returns each with the process that keeps them."""
    with ExitStack() as stack:

        def start() -> tuple[subprocess.Popen[str], psutil.Process]:
            command = [sys.executable, "-c", HOLDER, broker.url, MINE]
            holder = stack.enter_context(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
            stack.callback(holder.kill)
            return holder, psutil.Process(int(holder.stdout.readline()))

        yield start


def leased_for(client: redis.Redis, seconds: float, *leases: str) -> float:
    """Lease for so long; returns when the leases expire, in ms since the epoch."""
    expiry = time.time() * 1000 + seconds * 1000
    client.zadd(keys.LEASE_INDEX, dict.fromkeys(leases, expiry))
    return expiry


def test_a_dead_workers_leases_are_given_back_at_once(start_holder, redis_client: redis.Redis) -> None:
    """The process beside it sees it die, and lets go all that it had leased, what it did not know of yet as well."""
    own = (f"1-{MINE}0", f"12-{MINE}4f/tenant")
    others = ("3", "5-fedcba98760", f"eta:7-{MINE}1", f"eta:8-{MINE}2\nid", f"9/{MINE}")
    holder, keeper = start_holder()
    expiry = leased_for(redis_client, 29, *own, *others)

    holder.kill()

    eventually(lambda: not keeper.is_running(), 10, what="the end of its process")
    after = expiries(redis_client)
    assert after.keys() == {*own, *others}
    assert all(after[lease] <= time.time() * 1000 for lease in own)
    assert all(after[lease] == expiry for lease in others)


def test_what_its_holder_and_the_process_beside_it_held_lapses(start_holder, redis_client: redis.Redis) -> None:
    """Where both die together, as with their machine, nobody is there to give anything back."""
    holder, keeper = start_holder()
    leased_for(redis_client, 29, f"1-{MINE}0")
    keeper.kill()
    holder.kill()
    holder.wait()

    eventually(lambda: not keeper.is_running(), 10, what="the end of its process")
    assert expiries(redis_client)[f"1-{MINE}0"] > time.time() * 1000 + 10_000


def test_a_worker_that_dies_without_its_broker_gives_its_leases_back_when_that_returns(
    tmp_path: Path, make_keeper
) -> None:
    """The same where it stops and could not write what it held."""
    with EmbeddedBroker(tmp_path / "own", append_only=True) as own, redis.Redis.from_url(own.url) as client:
        leased_for(client, 600, f"1-{MINE}0")
        keeper = make_keeper(f"1-{MINE}0", redis_url=own.url, lease_seconds=600)
        process = process_of(keeper)
        own.kill()

        keeper.close()
        own.start()

        process.wait(20)
        assert expiries(client)[f"1-{MINE}0"] <= time.time() * 1000


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
