"""The leases' scripts on a real broker, with a clock that the test moves, and the thread that keeps a lease."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import redis

import shared.gpus
import workers.devices.lease
from shared.broker import lua
from shared.embedded import EmbeddedBroker
from tests.integration.devices.nvml.standin import uuid_of
from tests.support.waiting import eventually
from workers.devices.lease import GpuLeases, Lease, LeaseHolder

GPUS = [uuid_of(index) for index in range(4)]
LEASE = 30.0
CLOCK = "test:clock"


@dataclass
class Clock:
    """The broker's clock, as the scripts see it."""

    client: redis.Redis
    now: float = 1_700_000_000.0

    def advance(self, seconds: float) -> None:
        self.now += seconds
        self.client.hset(CLOCK, mapping={"s": int(self.now), "us": int(self.now % 1 * 1e6)})


@pytest.fixture
def clock(redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock in place of the server's."""

    def with_clock(package: str, name: str) -> str:
        text = lua(package, name)
        assert text.count("redis.call('TIME')") == 1
        return text.replace("redis.call('TIME')", f"redis.call('HMGET', '{CLOCK}', 's', 'us')")

    monkeypatch.setattr(workers.devices.lease, "lua", with_clock)
    monkeypatch.setattr(shared.gpus, "lua", with_clock)
    made = Clock(redis_client)
    made.advance(0)
    return made


@pytest.fixture
def leases(redis_client: redis.Redis, clock: Clock) -> Callable[[str], GpuLeases]:
    return lambda worker: GpuLeases(redis_client, LEASE, worker)


def test_all_or_nothing(leases) -> None:
    """Two of four, then three of the two that are left: nothing is taken."""
    first = leases("a").acquire(GPUS, 2)

    assert first.gpus == tuple(GPUS[:2])
    assert leases("b").acquire(GPUS, 3) is None
    assert leases("c").acquire(GPUS, 2).gpus == tuple(GPUS[2:])
    assert leases("d").acquire(GPUS, 1) is None


def test_the_order_of_the_candidates_counts(leases) -> None:
    """The first free ones, the least loaded as the worker sees it."""
    leases("a").acquire([GPUS[2]], 1)

    assert leases("b").acquire([GPUS[2], GPUS[3], GPUS[0]], 1).gpus == (GPUS[3],)


def test_the_board_shows_holders_and_time_left(leases, clock) -> None:
    held = leases("a")
    held.acquire(GPUS, 1)
    clock.advance(10)

    (lease,) = held.board().leases

    assert (lease.uuid, lease.holder.worker, lease.seconds_left) == (GPUS[0], "a", pytest.approx(20, abs=0.01))


def test_a_dead_holders_lease_expires(leases, clock) -> None:
    """Not before its time, and at its time."""
    leases("dead").acquire(GPUS, 4)
    clock.advance(LEASE - 0.01)
    assert leases("b").acquire(GPUS, 1) is None

    clock.advance(0.01)

    assert leases("b").acquire(GPUS, 4) is not None


def test_a_renewed_lease_stays(leases, clock) -> None:
    held = leases("a")
    lease = held.acquire(GPUS, 4)
    for _ in range(10):
        clock.advance(LEASE / 3)
        assert held.renew(lease) == []

    assert leases("b").acquire(GPUS, 1) is None


def test_who_was_silent_too_long_learns_that_its_gpus_are_anothers(leases, clock) -> None:
    """The lost one is named, the whole lease ends, and the other's is untouched by renewal and release."""
    frozen, other = leases("frozen"), leases("other")
    lease = frozen.acquire(GPUS[:2], 2)
    clock.advance(LEASE)
    taken = other.acquire(GPUS[1:2], 1)

    assert frozen.renew(lease) == [GPUS[1]]
    frozen.release(lease)

    assert [row.uuid for row in frozen.board().leases] == [GPUS[1]]
    assert other.renew(taken) == []


def test_a_lease_that_nobody_took_over_is_taken_up_again(leases, clock, redis_client) -> None:
    """After silence, and after the broker lost its data."""
    held = leases("a")
    lease = held.acquire(GPUS, 2)
    clock.advance(2 * LEASE)
    assert held.renew(lease) == []
    redis_client.delete(*shared.gpus.GPU_KEYS)

    assert held.renew(lease) == []
    assert leases("b").acquire(GPUS[:2], 1) is None


def test_a_marked_gpu_is_leased_by_nobody_until_the_mark_ends(leases, clock) -> None:
    """A shorter mark later does not shorten it."""
    held = leases("a")
    held.mark(GPUS[:1], "it no longer answers", 100)
    held.mark(GPUS[:1], "CUDA errors", 10)
    clock.advance(60)

    assert [(mark.uuid, mark.seconds_left) for mark in held.marked()] == [(GPUS[0], pytest.approx(40, abs=0.01))]
    assert held.acquire(GPUS[:1], 1) is None
    clock.advance(40)
    assert held.marked() == ()
    assert held.acquire(GPUS[:1], 1) is not None


def test_an_operator_takes_a_mark_off_with_one_command(leases, redis_client) -> None:
    """The one that the doctor names."""
    held = leases("a")
    held.mark(GPUS[:1], "Xid 79", 3600)

    redis_client.zrem("muai:gpu:marked", GPUS[0])

    assert held.acquire(GPUS[:1], 1) is not None


def test_nothing_is_left_behind(leases, clock, redis_client) -> None:
    """Released, expired and ended entries leave no keys."""
    held = leases("a")
    held.release(held.acquire(GPUS, 2))
    held.acquire(GPUS, 1)
    held.mark(GPUS[3:], "x", 5)
    clock.advance(LEASE)
    held.release(held.acquire(GPUS, 1))

    assert redis_client.exists(*shared.gpus.GPU_KEYS) == 0


# --- the bar: leases never overlap --------------------------------------------------------------------------------


@dataclass
class Worker:
    """A worker as far as its GPUs go. ``until`` is the time to which it may take its lease to be valid."""

    name: str
    size: int
    leases: GpuLeases
    lease: Lease | None = None
    until: float = 0.0
    frozen: bool = False


@dataclass
class Machine:
    """Workers over four GPUs; every holding is checked against every other one's."""

    clock: Clock
    make: Callable[[str], GpuLeases]
    rng: random.Random
    workers: list[Worker] = field(default_factory=list)
    started: int = 0
    ended: int = 0
    lost: int = 0
    full: int = 0
    marked: dict[str, float] = field(default_factory=dict)
    sizes: tuple[int, ...] = (2, 2, 1, 1, 1)

    def step(self) -> None:
        slots = {worker.name[0]: worker for worker in self.workers}
        slot = self.rng.randrange(len(self.sizes))
        worker = slots.get(str(slot))
        if worker is None:
            self.start(slot)
        else:
            self.rng.choice((self.stop, self.kill, self.freeze, self.thaw, self.renew, self.renew))(worker)
        self.clock.advance(self.rng.choice((0.001, 0.5, 3.0, LEASE / 3)))
        for other in [other for other in self.workers if not other.frozen]:
            if other.until - self.clock.now < LEASE / 2:
                self.renew(other)
        if self.rng.random() < 0.01:
            uuid = self.rng.choice(GPUS)
            self.workers and self.workers[0].leases.mark([uuid], "broken", 20)
            self.marked[uuid] = self.clock.now + 20 if self.workers else 0.0

    def start(self, slot: int) -> None:
        self.started += 1
        worker = Worker(f"{slot}-{self.started}", self.sizes[slot], self.make(f"{slot}-{self.started}"))
        worker.lease = worker.leases.acquire(self.rng.sample(GPUS, len(GPUS)), worker.size)
        if worker.lease is None:
            self.full += 1
            return
        assert len(set(worker.lease.gpus)) == worker.size
        assert not [uuid for uuid in worker.lease.gpus if self.marked.get(uuid, 0) > self.clock.now]
        self.granted(worker)
        self.workers.append(worker)

    def granted(self, worker: Worker) -> None:
        """From now on for the length of a lease these are this worker's: then they must be nobody else's."""
        for other in self.workers:
            if other is not worker and other.until > self.clock.now and other.lease and worker.lease:
                assert not set(other.lease.gpus) & set(worker.lease.gpus), (other, worker)
        worker.until = self.clock.now + LEASE

    def renew(self, worker: Worker) -> None:
        if worker.frozen or worker.lease is None:
            return
        if worker.leases.renew(worker.lease):
            assert worker.until <= self.clock.now, "lost before it expired"
            self.lost += 1
            self.end(worker)
        else:
            self.granted(worker)

    def stop(self, worker: Worker) -> None:
        if worker.frozen:
            return
        worker.leases.release(worker.lease)
        worker.until = 0.0
        self.end(worker)

    def kill(self, worker: Worker) -> None:
        """It is gone, but its lease stands: whoever holds its GPUs before that expires overlaps with it."""
        self.ended += 1
        worker.frozen = True
        worker.name = f"dead {worker.name}"

    def freeze(self, worker: Worker) -> None:
        worker.frozen = True

    def thaw(self, worker: Worker) -> None:
        if worker.frozen:
            worker.frozen = False
            self.renew(worker)

    def end(self, worker: Worker) -> None:
        self.ended += 1
        self.workers.remove(worker)


@pytest.mark.property
@pytest.mark.parametrize("seed", range(3))
def test_leases_never_overlap_in_1000_starts_stops_and_kills(leases, clock, seed: int) -> None:
    """Two workers of two GPUs and three of one on four GPUs; starts, stops, kills, freezes, renewals and marks."""
    machine = Machine(clock, leases, random.Random(seed))
    while machine.started - machine.full + machine.ended < 1000:
        machine.step()

    assert machine.lost > 10
    assert machine.full > 10


# --- the thread that keeps a lease --------------------------------------------------------------------------------


@pytest.fixture
def keeper(redis_client: redis.Redis) -> Iterator[Callable[..., tuple[LeaseHolder, list[str]]]]:
    """Holds GPU 0 for real, with a short lease."""
    made: list[LeaseHolder] = []

    def hold(leases: GpuLeases) -> tuple[LeaseHolder, list[str]]:
        lost: list[str] = []
        asked_at = time.monotonic()
        lease = leases.acquire(GPUS, 1)
        assert lease is not None
        holder = LeaseHolder(leases, lease, asked_at, lost.extend)
        holder.start()
        made.append(holder)
        return holder, lost

    yield hold
    for holder in made:
        holder.close()


def test_a_held_lease_is_renewed_and_released(keeper, redis_client) -> None:
    leases = GpuLeases(redis_client, 0.3, "a")
    holder, lost = keeper(leases)
    first = holder.grant

    eventually(lambda: holder.grant.until > first.until + 0.3, what="renewals beyond the first lease")
    assert holder.valid
    holder.close()

    assert not holder.valid
    assert leases.board().leases == ()
    assert lost == []


def test_a_lost_lease_is_told_once(keeper, redis_client) -> None:
    leases = GpuLeases(redis_client, 0.6, "a")
    holder, lost = keeper(leases)
    redis_client.hset("muai:gpu:holders", GPUS[0], 'another\n{"worker":"b","host":"h","pid":1}')

    eventually(lambda: lost)
    holder.close()

    assert (lost, holder.valid) == ([GPUS[0]], False)
    assert redis_client.hexists("muai:gpu:holders", GPUS[0])


def test_a_silent_broker_makes_the_lease_unsure_and_takes_nothing(tmp_path, keeper) -> None:
    """While it is away the holder is not sure; when it is back, without its data, the lease is taken up again."""
    with EmbeddedBroker(tmp_path, append_only=False) as broker:
        client = redis.Redis.from_url(broker.url, socket_timeout=1)
        holder, lost = keeper(GpuLeases(client, 0.6, "a"))
        broker.kill()
        eventually(lambda: not holder.valid, what="the end of the certain time")
        broker.start()

        eventually(lambda: holder.valid, what="a renewal on the new broker")

        assert lost == []
        assert GpuLeases(client, 0.6, "b").acquire(GPUS[:1], 1) is None
        holder.close()
        client.close()


def test_many_who_ask_at_once_get_different_gpus(redis_client) -> None:
    """Eight threads for four GPUs: four get one each."""
    got: list[str] = []
    gate = threading.Barrier(8)

    def ask(number: int) -> None:
        leases = GpuLeases(redis_client, LEASE, str(number))
        gate.wait()
        lease = leases.acquire(GPUS, 1)
        if lease:
            got.extend(lease.gpus)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(got) == GPUS
