"""Lanes of one tenant for one worker: whom they are meant for has them first, and nobody waits for ever."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared import keys
from shared.limits import Limits, LimitsInForce
from shared.settings import FleetSettings, Settings
from tests.support.brokers import MemorySide, RedisSide
from tests.support.clock import ManualClock
from workers.broker.delivery import COURTESY_SECONDS, Settlement

pytestmark = pytest.mark.property
WORKERS = ("", "one", "two")
TENANTS = ("default", "acme")
EXAMPLES = settings(
    max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(params=["memory", "redis"])
def make(request: pytest.FixtureRequest, broker) -> Iterator[object]:
    """Makes an empty broker with a clock: in memory, and a real one."""
    made = []

    def side(clock: ManualClock) -> MemorySide | RedisSide:
        fleet = FleetSettings()
        limits = LimitsInForce(Limits.of(Settings(fleet=fleet)))
        new = (
            MemorySide(clock, fleet, limits)
            if request.param == "memory"
            else RedisSide(broker.url, clock, fleet, limits)
        )
        made.append(new)
        return new

    yield side
    for one in made:
        if isinstance(one, RedisSide):
            one.close()


def claimed_by(side: MemorySide | RedisSide, worker: str, limit: int) -> list[bytes]:
    """What a worker claims; it is through with it at once."""
    side.delivery.affinity = worker
    claim = side.delivery.claim("fake", limit)
    side.delivery.settle([Settlement(message.lease) for message in claim.messages])
    return [message.payload for message in claim.messages]


@EXAMPLES
@given(st.lists(st.tuples(st.sampled_from(TENANTS), st.sampled_from(WORKERS)), min_size=1, max_size=12))
def test_whom_a_message_is_meant_for_has_it_first(make, sent) -> None:
    """The worker gets all that is meant for it and what is common, and nothing of another's before its time is up."""
    clock = ManualClock()
    side = make(clock)
    for number, (tenant, worker) in enumerate(sent):
        side.submit(keys.list_of("fake", 3, tenant, worker), str(number), f"{number} {worker}".encode())

    mine = claimed_by(side, "one", 100)
    clock.now += COURTESY_SECONDS + 0.001
    others = claimed_by(side, "one", 100)
    clock.now += 100
    others += claimed_by(side, "one", 100) + claimed_by(side, "one", 100)
    for _ in sent:  # each message that is taken lets its lane wait again for its worker
        clock.now += COURTESY_SECONDS + 0.001
        others += claimed_by(side, "one", 100)

    assert {payload.split()[-1] for payload in mine} <= {b"one"} | {payload.split()[0] for payload in mine}
    assert sorted(mine) == sorted(f"{n} {w}".encode() for n, (_, w) in enumerate(sent) if w != "two")
    assert sorted(others) == sorted(f"{n} {w}".encode() for n, (_, w) in enumerate(sent) if w == "two")
    assert side.delivery.claim("fake", 1).messages == []


def test_a_tenant_with_many_lanes_gets_one_tenants_turns(make) -> None:
    """Ten lanes of one tenant and one of another: they take turns as tenants."""
    clock = ManualClock()
    side = make(clock)
    for number in range(10):
        side.submit(keys.list_of("fake", 3, "acme", f"w{number}"), f"a{number}", b"acme")
        side.submit(keys.list_of("fake", 3, "beta"), f"b{number}", b"beta")
    clock.now += 2 * COURTESY_SECONDS

    assert sorted(claimed_by(side, "", 10)) == [b"acme"] * 5 + [b"beta"] * 5
