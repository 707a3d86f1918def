"""How long a request may wait and run, as a Celery sender says it: ``expires``, time limits."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from shared.contract import EngineName
from shared.errors import EngineBusy
from tests.support.items import item_of
from tests.support.memory_worker import MemoryFleet, MemoryWorker, settings_of
from workers.path.run_limits import RunLimits

FAKE = EngineName.FAKE


@pytest.fixture
def fleet() -> MemoryFleet:
    return MemoryFleet(settings_of(FAKE, batcher={"max_batch_size": 2}))


@pytest.fixture
def worker(fleet: MemoryFleet) -> MemoryWorker:
    return fleet.worker(FAKE)


def submit(fleet: MemoryFleet, name: str, *, expires: float | None = None, **headers: Any) -> None:
    if expires is not None:
        headers["expires"] = datetime.fromtimestamp(fleet.clock() + expires, UTC).isoformat()
    fleet.submit(name, headers=headers)


def aborted(worker: MemoryWorker) -> list[str]:
    return [item.id for item in worker.runners[FAKE].aborted]


# -- expires ----------------------------------------------------------------------------------------------------------


def test_what_has_started_may_end_after_it_has_expired(fleet: MemoryFleet, worker: MemoryWorker):
    """Nobody takes it over meanwhile, and a passing error is tried again."""
    submit(fleet, "a", expires=2)
    worker.turn()
    fleet.pass_time(60)
    worker.tend()
    worker.sweeper.sweep()
    assert (aborted(worker), fleet.status("a"), worker.in_flight) == ([], None, 1)

    worker.runners[FAKE].complete(EngineBusy())
    worker.turn()
    fleet.pass_time(1)
    worker.turn()
    worker.runners[FAKE].complete()
    worker.turn()

    assert fleet.status("a") == "SUCCESS"


def test_what_has_not_started_does_not_when_it_has_expired(fleet: MemoryFleet, worker: MemoryWorker):
    """Whether it waits in the broker or here."""
    submit(fleet, "a")
    submit(fleet, "b")
    worker.turn()
    submit(fleet, "c", expires=2)
    fleet.pass_time(3)
    worker.runners[FAKE].complete()
    worker.turn()

    assert fleet.status("c") == "REVOKED"
    worker.limits.replace(batcher={"adaptive_batching": False, "batch_timeout_ms": 1e6})
    submit(fleet, "d", expires=2)
    worker.turn()
    fleet.pass_time(3)
    worker.tend()
    worker.turn()
    assert fleet.status("d") == "REVOKED"


# -- time limits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("timelimit", "after", "error"),
    [
        ([10, None], 10, "TimeLimitExceeded: the request ran for its time limit of 10 s"),
        ([10, 4.5], 4.5, "SoftTimeLimitExceeded: the request ran for its soft time limit of 4.5 s"),
        ([None, 4], 4, "SoftTimeLimitExceeded: the request ran for its soft time limit of 4 s"),
        ([3, 4], 5, "TimeLimitExceeded: the request ran for its time limit of 3 s"),
    ],
)
def test_what_runs_for_too_long_fails(
    fleet: MemoryFleet, worker: MemoryWorker, timelimit: list[float | None], after: float, error: str
):
    """The engine is told, and nothing else is tried."""
    submit(fleet, "a", timelimit=timelimit)
    submit(fleet, "b")
    worker.turn()
    fleet.pass_time(min(one for one in timelimit if one) - 0.5)
    worker.tend()
    assert fleet.status("a") is None

    fleet.pass_time(after)
    worker.tend()
    worker.turn()

    assert (fleet.error("a"), aborted(worker)) == (error, ["a"])
    worker.runners[FAKE].complete()
    worker.turn()
    assert fleet.status("b") == "SUCCESS"


def test_neither_waiting_nor_loading_is_run_time(fleet: MemoryFleet, worker: MemoryWorker):
    submit(fleet, "x")
    submit(fleet, "y")
    worker.turn()
    submit(fleet, "a", timelimit=[5, None])
    fleet.pass_time(30)
    worker.runners[FAKE].complete()
    worker.turn()
    fleet.pass_time(0.1)
    worker.turn()
    (item,) = worker.intakes[FAKE].table
    assert item.id == "a"
    item.began = 0.0  # its model is loaded
    fleet.pass_time(30)
    worker.tend()

    assert fleet.status("a") is None


def test_the_limits_in_force_are_for_those_that_name_none(fleet: MemoryFleet, worker: MemoryWorker):
    worker.time_limits = (2.0, None)
    submit(fleet, "a", timelimit=[None, None])
    submit(fleet, "b", timelimit=[60, None])
    worker.turn()
    fleet.pass_time(3)
    worker.tend()
    worker.turn()

    assert fleet.error("a").startswith("TimeLimitExceeded")
    assert fleet.status("b") is None


def test_a_limit_of_0_is_none():
    item = item_of(header_timelimit=[0, 0])
    item.decode()
    item.validated([], {"request": {"model": "m", "inputs": {"prompt": "a"}}})
    item.began = 1.0

    assert item.time_limits == (None, None)
    assert RunLimits(lambda: (0, 0), lambda: 1e9).exceeded(item) is None


@pytest.mark.parametrize("timelimit", ["soon", [1], [1, 2, 3], ["1", None], [-1, None], [True, None], {"hard": 1}, 5])
def test_time_limits_that_are_none_are_the_senders_error(fleet: MemoryFleet, worker: MemoryWorker, timelimit: object):
    submit(fleet, "a", timelimit=timelimit)
    worker.turn()

    assert fleet.error("a").startswith("BadRequest: timelimit must be")
