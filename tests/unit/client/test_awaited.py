"""Who waits for which outcome: each with a future of their own, as long as they hold it."""

from __future__ import annotations

import asyncio
import gc
from concurrent.futures import CancelledError, Future

import pytest

from producer.client.awaited import LOOKED_UP, Awaited
from producer.client.records import POLL_SECONDS
from shared import wire
from shared.errors import ClientClosed, EngineError, FleetError
from tests.support.clock import ManualClock


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def table(clock: ManualClock) -> Awaited[Future]:
    return Awaited(Future, clock)


def test_each_who_waits_has_a_future_of_their_own(table: Awaited[Future]) -> None:
    """One that is cancelled takes neither the others along nor whoever resolves them."""
    first, second = table.expect(["a", "a"])
    (other,) = table.expect(["b"])
    assert first.cancel()

    table.resolve_record(wire.failure_meta("a", EngineError("a's")))
    table.resolve("b", FleetError("b's"))

    assert [str(second.result(0)), str(other.result(0))] == ["a's", "b's"]
    with pytest.raises(CancelledError):
        first.result(0)
    assert len(table) == 0


def test_a_cancelled_future_of_asyncio_harms_nobody() -> None:
    """The same on a loop."""

    async def main() -> str:
        table = Awaited(asyncio.get_running_loop().create_future)
        first, second = table.expect(["a", "a"])
        first.cancel()
        table.resolve("a", FleetError("told"))
        return str(await second)

    assert asyncio.run(main()) == "told"


def test_what_nobody_holds_leaves_the_table(table: Awaited[Future]) -> None:
    """Ids that nobody has heard of, or that are asked for again and again, leave nothing behind."""
    for number in range(1000):
        table.expect([f"unknown-{number}"])
        table.watch([f"unknown-{number}"])
        table.expect(["again"])
    held = table.expect(["again", "held"])
    gc.collect()

    assert len(table) == 2
    assert not table.elsewhere
    assert table.due() == ["again", "held"]
    del held
    assert len(table) == 0
    assert table._refs == table._elsewhere == {}


def test_who_is_to_be_called_back_need_not_hold_it(table: Awaited[Future]) -> None:
    """It is held until it is done."""
    called: list[str] = []
    (future,) = table.expect(["a"])
    future.add_done_callback(lambda done: called.append(str(done.result())))
    table.hold(future)
    future.add_done_callback(table.release)
    del future
    gc.collect()

    table.resolve("a", FleetError("told"))

    assert called == ["told"]
    assert not table.holds


def test_a_refused_request_is_forgotten_for_who_was_refused_only(table: Awaited[Future]) -> None:
    """Whoever waits for the same id waits on, and is told."""
    (first,) = table.expect(["a"])
    refused = table.expect(["a", "b"])
    table.forget(["a", "b"], refused)
    table.resolve("a", FleetError("told"))

    assert str(first.result(0)) == "told"
    assert not refused[0].done()
    assert len(table) == 0


def test_all_are_looked_up_in_turn(table: Awaited[Future], clock: ManualClock) -> None:
    """However many there are that are never answered."""
    names = [f"r{number}" for number in range(3 * LOOKED_UP)]
    held = table.expect(names)
    seen: set[str] = set()
    for _ in range(3):
        seen.update(table.due())
        clock.now += POLL_SECONDS

    assert seen == set(names)
    assert len(held) == len(names)


def test_the_end_is_told_to_all_and_to_who_comes_later(table: Awaited[Future]) -> None:
    """Nobody waits for a client that is closed."""
    (before,) = table.expect(["a"])
    table.end()
    (after,) = table.expect(["b"])

    for future in (before, after):
        with pytest.raises(ClientClosed):
            future.result(0)
