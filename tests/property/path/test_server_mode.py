"""Properties of a worker as a server: what comes while it is busy waits in its queue, and a stop loses nothing."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import keys
from shared.contract import EngineName, Priority
from tests.support.memory_worker import MemoryFleet, MemoryWorker, settings_of

pytestmark = pytest.mark.property

FAKE = EngineName.FAKE
EXAMPLES = settings(max_examples=150, deadline=None, derandomize=True)


def fleet_of(size: int) -> MemoryFleet:
    return MemoryFleet(settings_of(FAKE, batcher={"max_batch_size": size}))


def waiting(fleet: MemoryFleet) -> list[str]:
    """The ids on the queue's lists, the next to be claimed first."""
    found = fleet.broker.queues.waiting()
    return [orjson.loads(message)["headers"]["id"] for name in keys.lists_of("fake") for message in found.get(name, [])]


def work_off(fleet: MemoryFleet, worker: MemoryWorker) -> list[str]:
    """Answer batch after batch until nothing is left; returns the ids in the order in which they were started."""
    order: list[str] = []
    runner = worker.runners[FAKE]
    for _ in range(1000):
        worker.turn()
        fleet.pass_time(0.1)
        worker.turn()
        if not runner.runs:
            return order
        order += [item.id for run in runner.runs for item in run.batch.items]
        runner.complete()
    raise AssertionError("it does not come to an end")


# Feature: advanced-optimization-monitoring, Property 26: what is accepted waits in its queue
@given(size=st.integers(1, 5), slots=st.sampled_from([None, 1, 3]), before=st.integers(0, 6), after=st.integers(1, 20))
@EXAMPLES
def test_what_comes_while_the_engine_is_busy_is_queued_and_answered_in_turn(
    size: int, slots: Any, before: int, after: int
):
    """Every request is on the queue until there is room for it, and all are answered in the order of their coming."""
    fleet = fleet_of(size)
    worker = fleet.worker(FAKE, slots=slots)
    names = [f"r{number}" for number in range(before + after)]
    for name in names[:before]:
        fleet.submit(name)
    worker.turn()
    for name in names[before:]:
        assert fleet.submit(name)
    held = worker.in_flight
    assert waiting(fleet) == names[held:]

    started = [item.id for run in worker.runners[FAKE].runs for item in run.batch.items]
    worker.runners[FAKE].complete()
    started += work_off(fleet, worker)

    assert started == names
    assert all(fleet.status(name) == "SUCCESS" for name in names)
    assert waiting(fleet) == []


# Feature: advanced-optimization-monitoring, Property 28: a worker that stops answers what it has begun
@given(
    size=st.integers(1, 4),
    slots=st.sampled_from([None, None, 2]),
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    answered=st.integers(0, 4),
    in_time=st.booleans(),
    claim_under_way=st.booleans(),
    deliveries=st.sampled_from([0, 0, 2]),
    priority=st.sampled_from(list(Priority)),
)
@EXAMPLES
def test_a_worker_that_stops_ends_what_it_runs_and_hands_the_rest_on(
    size: int,
    slots: Any,
    counts: list[int],
    answered: int,
    in_time: bool,
    claim_under_way: bool,
    deliveries: int,
    priority: Priority,
):
    """What runs is answered within the grace; all else is back on its queue at once, in order, and is answered there.

    Whatever is under way at the signal: claims, members of a batch that were answered, a request that runs alone.
    """
    fleet = fleet_of(size)
    worker = fleet.worker(FAKE, slots=slots)
    runner, names = worker.runners[FAKE], []
    for count in counts:
        for _ in range(count):
            names.append(f"r{len(names)}")
            fleet.submit(names[-1], priority=priority, deliveries=deliveries)
        worker.turn()
    if claim_under_way:
        worker.claim(FAKE)
    for run in runner.runs[:1]:
        for item in run.unreported[:answered]:
            runner.finish(run, item)
    running = [item.id for run in runner.runs for item in run.batch.items]
    unreported = [item.id for run in runner.runs for item in run.unreported]

    worker.begin_stop()
    through = worker.wind_up()
    assert through == (not unreported)
    assert waiting(fleet) == [name for name in names if name not in running]
    if in_time:
        runner.complete()
        assert worker.wind_up()
        assert all(fleet.status(name) == "SUCCESS" for name in running)
    else:
        assert worker.wind_up(hurry=True)
        assert waiting(fleet) == [name for name in names if fleet.status(name) is None]
    assert not fleet.broker.leases
    worker.leave()

    work_off(fleet, fleet.worker(FAKE, slots=slots))
    assert all((fleet.status(name), fleet.answers(name)) == ("SUCCESS", 1) for name in names)
