"""What a queue takes and what it refuses, over random bursts on a real broker."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import orjson
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from producer.client.blocking import Blocking
from producer.client.submission import Submission
from producer.client.submitter import Submitter
from shared.contract import EngineName, InferenceRequest, Priority
from shared.errors import QueueFull
from shared.queues import waiting
from shared.settings import FleetSettings, Settings
from workers.broker.delivery import RedisDelivery, Settlement

pytestmark = pytest.mark.property
EXAMPLES = settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TENANTS = ("default", "acme", "beta")
PRIORITIES = st.sampled_from(list(Priority))
ENGINES = (EngineName.ONNX, EngineName.PYTORCH)


class Queues:
    """An empty broker with a producer and a worker's side."""

    def __init__(self, client: redis.Redis, **fleet: Any) -> None:
        client.flushall()
        options = Settings(fleet=FleetSettings(**fleet))
        self._client = client
        self._submitter = Submitter(options, "muai:reply:test")
        self._blocking = Blocking(client)
        self._delivery = RedisDelivery(client, options.fleet)

    def submit(self, tenant: str, priority: Priority, engine: EngineName, count: int) -> list[str]:
        """The ids of new requests that were all taken."""
        fields = {"model": "m", "inputs": {"prompt": "x"}, "tenant": tenant, "priority": priority}
        requests = [InferenceRequest.parse(fields) for _ in range(count)]
        assert all(
            self._blocking.run(self._submitter.submit([(Submission(request), engine) for request in requests], 1.0))
        )
        return [request.id for request in requests]

    def claim(self, engine: EngineName, most: int) -> list[str]:
        """The ids of requests that are claimed and ended."""
        messages = self._delivery.claim(engine, most).messages
        self._delivery.settle([Settlement(message.lease) for message in messages])
        return [orjson.loads(message.payload)["headers"]["id"] for message in messages]

    def waiting(self, engine: EngineName) -> int:
        """How many requests wait."""
        return waiting(self._client, [engine])[engine]


# Feature: advanced-optimization-monitoring, Property 26: what is accepted waits in its queue
@EXAMPLES
@given(
    bursts=st.lists(
        st.tuples(st.sampled_from(TENANTS), PRIORITIES, st.sampled_from(ENGINES), st.integers(1, 6)), max_size=12
    ),
    size=st.integers(1, 9),
)
def test_every_request_waits_on_its_engines_queue_and_is_handed_out_once(redis_client, bursts, size: int) -> None:
    """On no other queue, until a worker claims it; those of one tenant and priority in the order they came in."""
    queues = Queues(redis_client)
    sent: dict[tuple[EngineName, str, Priority], list[str]] = defaultdict(list)
    for tenant, priority, engine, count in bursts:
        sent[engine, tenant, priority] += queues.submit(tenant, priority, engine, count)

    for engine in ENGINES:
        mine = {line: ids for line, ids in sent.items() if line[0] is engine}
        left = sum(map(len, mine.values()))
        out: list[str] = []
        while left:
            assert queues.waiting(engine) == left
            claimed = queues.claim(engine, size)
            assert len(claimed) == min(size, left)
            out += claimed
            left -= len(claimed)
        assert queues.claim(engine, size) == []
        assert sorted(out) == sorted(name for ids in mine.values() for name in ids)
        for ids in mine.values():
            assert [name for name in out if name in ids] == ids


STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(TENANTS), PRIORITIES, st.integers(1, 8)),
        st.integers(1, 8),
    ),
    max_size=20,
)


# Feature: advanced-optimization-monitoring, Property 27: a full queue refuses
@EXAMPLES
@given(capacity=st.integers(1, 12), steps=STEPS, alone=st.booleans())
def test_no_queue_takes_more_than_its_capacity(redis_client, capacity: int, steps, alone: bool) -> None:
    """All of a call or none of it; only where it would not fit; and never, by all tenants together, twice as many."""
    engine = EngineName.ONNX
    queues = Queues(redis_client, queue_capacity=capacity)
    for step in steps:
        before = queues.waiting(engine)
        if isinstance(step, int):
            assert len(queues.claim(engine, step)) == min(step, before)
            continue
        tenant, priority, count = step
        try:
            queues.submit(TENANTS[0] if alone else tenant, priority, engine, count)
        except QueueFull as refusal:
            assert before + count > capacity
            assert refusal.retry_after > 0  # noqa: PT017  # that it is raised is what is being decided
            assert queues.waiting(engine) == before
        else:
            assert queues.waiting(engine) == before + count
            assert before + count <= (capacity if alone else 2 * capacity)
