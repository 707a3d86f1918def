"""Properties of the scripts that share a queue out, over random traffic on a real broker."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from producer.client.blocking import Blocking
from producer.client.submission import Submission
from producer.client.submitter import Submitter
from shared import keys
from shared.contract import EngineName, InferenceRequest, Priority
from shared.errors import QueueFull
from shared.settings import FleetSettings, Settings, TenantSettings
from workers.broker.delivery import RedisDelivery, Settlement

pytestmark = pytest.mark.property
EXAMPLES = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TENANTS = ("default", "acme", "beta", "a.b-c_D")
QUEUE = EngineName.FAKE


class Queue:
    """A queue with a producer and a worker's side."""

    def __init__(self, client: redis.Redis, **fleet: Any) -> None:
        client.flushall()
        self.client = client
        options = Settings(fleet=FleetSettings(**fleet))
        self.submitter = Submitter(options, "muai:reply:test")
        self.blocking = Blocking(client)
        self.delivery = RedisDelivery(client, options.fleet)
        self.where: dict[str, tuple[str, Priority]] = {}

    def submit(self, tenant: str, priority: Priority = Priority.NORMAL, count: int = 1) -> list[bool]:
        requests = [
            InferenceRequest.parse({"model": "echo", "inputs": {"prompt": "x"}, "tenant": tenant, "priority": priority})
            for _ in range(count)
        ]
        self.where.update({request.id: (tenant, priority) for request in requests})
        return self.blocking.run(self.submitter.submit([(Submission(request), QUEUE) for request in requests], 0.0))

    def claim(self, limit: int) -> list[tuple[str, str, Priority]]:
        """Leases, with the tenant and priority of their requests."""
        claim = self.delivery.claim(QUEUE, limit)
        found = []
        for message in claim.messages:
            (request_id,) = [name for name in self.where if name.encode() in message.payload]
            found.append((message.lease, *self.where[request_id]))
        return found

    @property
    def waiting(self) -> int:
        """Messages on all lists of the queue."""
        lists = [name for name in self.client.keys("*") if name.startswith((b"fake", b"muai:lane:"))]
        return sum(self.client.llen(name) for name in lists)


PRIORITIES = st.sampled_from(list(Priority))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.sampled_from(TENANTS), PRIORITIES, st.integers(1, 6)),
        st.tuples(st.just("claim"), st.integers(1, 9)),
        st.tuples(st.just("end"), st.sampled_from(["ack", "back", "die"])),
    ),
    max_size=30,
)


@EXAMPLES
@given(STEPS)
def test_what_is_counted_is_what_is_there(redis_client, steps):
    """Whatever is submitted, claimed, ended, given back or left by a dead worker: nothing is lost, no count drifts."""
    queue = Queue(redis_client, lease_seconds=0.001)
    held: list[str] = []
    submitted = ended = 0
    for step in steps:
        if step[0] == "submit":
            queue.submit(*step[1:])
            submitted += step[3]
        elif step[0] == "claim":
            held += [lease for lease, *_ in queue.claim(step[1])]
        elif held and step[1] == "die":
            while redis_client.zcount(keys.LEASE_INDEX, "-inf", "+inf"):
                _, taken = queue.delivery.sweep()
                queue.delivery.settle([Settlement.give_back(swept.lease) for swept in taken])
            held.clear()
        elif held:
            lease = held.pop()
            ended += step[1] == "ack"
            queue.delivery.settle([Settlement(lease) if step[1] == "ack" else Settlement.give_back(lease)])

        assert queue.waiting + len(held) + ended == submitted
        state = redis_client.hgetall(keys.queue_state(QUEUE))
        lanes = redis_client.keys("muai:lane:*")
        assert int(state.get(b"laned", 0)) == sum(redis_client.llen(name) for name in lanes)
        if not queue.waiting:
            assert not lanes
        in_flight = sum(int(count) for count in redis_client.hvals(keys.IN_FLIGHT))
        assert in_flight == sum("/" in lease for lease in held)

    while found := queue.claim(7):
        ended += len(found)
        queue.delivery.settle([Settlement(lease) for lease, *_ in found])
    assert ended + len(held) == submitted
    assert int(redis_client.hget(keys.queue_state(QUEUE), "bytes") or 0) == 0


@EXAMPLES
@given(
    st.integers(1, 12), st.lists(st.tuples(PRIORITIES, st.integers(1, 30)), min_size=1, max_size=6), st.integers(1, 9)
)
def test_no_request_is_passed_for_ever(redis_client, limit, bursts, size):
    """A waiting priority has its turn after ``starvation_limit`` more urgent requests, however the claims are cut."""
    queue = Queue(redis_client, starvation_limit=limit)
    for priority, count in bursts:
        queue.submit("default", priority, count)
    left = Counter(priority for _, priority in queue.where.values())
    order = []
    while found := queue.claim(size):
        order += [priority for _, _, priority in found]

    assert Counter(order) == left
    since: Counter[Priority] = Counter()
    ranks = list(Priority)
    for taken in order:
        left[taken] -= 1
        since[taken] = 0
        for other in ranks:
            if other is not taken and left[other]:
                since[other] += 1
                assert ranks.index(other) == 0 or since[other] <= limit + len(ranks)
    urgent = [place for place, taken in enumerate(order) if taken is Priority.HIGH]
    for number, place in enumerate(urgent):
        assert place <= number + (len(ranks) - 1) * (number // limit + 1)


@EXAMPLES
@given(
    st.dictionaries(st.sampled_from(TENANTS), st.tuples(st.integers(1, 60), st.sampled_from([1, 2, 4])), min_size=2),
    st.integers(1, 9),
)
def test_waiting_tenants_take_turns_by_their_weights(redis_client, tenants, size):
    """While several tenants wait, each gets turns in proportion to its weight, within one round."""
    rules = {tenant: TenantSettings(weight=weight) for tenant, (_, weight) in tenants.items()}
    queue = Queue(redis_client, tenants=rules)
    queue.delivery.share_out(100)
    for tenant, (count, _) in tenants.items():
        queue.submit(tenant, Priority.NORMAL, count)
    left = Counter({tenant: count for tenant, (count, _) in tenants.items()})
    served: Counter[str] = Counter()
    while found := queue.claim(size):
        for _, tenant, _ in found:
            if all(left.values()):
                served[tenant] += 1
            left[tenant] -= 1
        if not all(left.values()):
            break

    shares = [served[tenant] / weight for tenant, (_, weight) in tenants.items()]
    assert max(shares) - min(shares) <= 2


def test_who_comes_anew_each_time_gets_no_more_than_who_waits(redis_client):
    """A tenant with one request at a time and one with a thousand waiting take turns; so does the shared list."""
    queue = Queue(redis_client)
    for waits, comes in (("a", "z"), ("z", "a"), ("default", "z"), ("a", "default")):
        queue.submit(waits, count=200)
        served: Counter[str] = Counter()
        for _ in range(100):
            queue.submit(comes)
            while not (found := queue.claim(1)):
                pass
            served[found[0][1]] += 1
        assert 40 <= served[comes] <= 60, (waits, comes, served)
        while queue.claim(100):
            pass


def test_a_tenants_share_of_what_is_in_flight(redis_client):
    """No more of a tenant's requests are claimed than its share of the fleet's places; ended ones make room."""
    queue = Queue(redis_client, tenants={"acme": TenantSettings(in_flight_share=0.25)})
    queue.delivery.share_out(16)
    queue.submit("acme", count=10)

    first = queue.delivery.claim(QUEUE, 32)
    queue.submit("beta", count=3)
    second = queue.delivery.claim(QUEUE, 32)
    third = queue.delivery.claim(QUEUE, 32)
    queue.delivery.settle([Settlement(message.lease) for message in first.messages[:2]])
    fourth = queue.delivery.claim(QUEUE, 32)

    assert [len(claim.messages) for claim in (first, second, third, fourth)] == [4, 3, 0, 2]
    assert (third.waiting, third.left_out) == (0, 1)


def test_a_queue_has_a_capacity_that_one_tenant_cannot_fill_against_another(redis_client):
    """Exactly as many as fit are taken; another tenant is let in up to its equal share; then it is refused as well."""
    queue = Queue(redis_client, queue_capacity=100)
    queue.submit("flood", count=60)
    queue.submit("flood", count=40)
    for tenant in ("flood", "flood"):
        with pytest.raises(QueueFull, match="100 requests wait"):
            queue.submit(tenant)
    queue.submit("small", count=50)
    with pytest.raises(QueueFull):
        queue.submit("small")
    assert queue.waiting == 150
    while queue.claim(50):
        pass
    queue.submit("flood")


def test_a_queue_has_a_capacity_in_bytes(redis_client):
    """What waits is counted in bytes as well, and counted down again."""
    queue = Queue(redis_client, queue_capacity_bytes=10_000)
    queue.submit("default")
    each = int(redis_client.hget(keys.queue_state(QUEUE), "bytes"))
    sent = 10_000 // each
    queue.submit("default", count=sent - 1)
    with pytest.raises(QueueFull):
        queue.submit("default")
    size = int(redis_client.hget(keys.queue_state(QUEUE), "bytes"))
    assert 9_000 < size <= 10_000
    assert len(queue.claim(3)) == 3
    queue.submit("default", count=3)
    assert queue.waiting == sent
