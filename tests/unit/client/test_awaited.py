"""Who waits for which outcome: each with a future of their own, as long as they hold it."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future

import pytest

from producer.client.awaited import LOOKED_UP, Awaited
from producer.client.records import POLL_SECONDS
from producer.client.requests import Requests
from producer.client.submitted import Submitted
from shared import wire
from shared.errors import ClientClosed, EngineError, FleetError
from shared.settings import Settings
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


def test_what_was_submitted_is_told_without_a_future(table: Awaited[Future]) -> None:
    """It leaves the table with its outcome, or when nobody holds it any longer."""
    first, again, dropped = Submitted("a"), Submitted("a"), Submitted("b")
    table.add([first, again, dropped])
    (future,) = table.expect(["a"])
    del dropped

    assert len(table) == 1
    table.resolve("a", FleetError("told"))

    assert [str(first.known), str(again.known), str(future.result(0))] == ["told"] * 3
    assert len(table) == 0


class Known:
    """Replies that come by nobody's reading."""

    stream = "muai:reply:me"

    def __init__(self) -> None:
        self.awaited: Awaited[Future] = Awaited(self._new)

    def _new(self) -> Future:
        future = Future()
        future.table = self.awaited
        return future

    def expect(self, request_ids: Sequence[str]) -> list[Future]:
        return self.awaited.expect(request_ids)

    def add(self, submitted: Sequence[Submitted]) -> None:
        self.awaited.add(submitted)


def test_a_future_that_is_made_late_has_the_outcome() -> None:
    """One of before it was told is resolved, one of after it is made so; a cancelled one is made anew."""
    replies = Known()
    requests = Requests(Settings(), replies, None)
    early, late = Submitted("early"), Submitted("late")
    replies.add([early, late])
    cancelled = requests.future_of(early)
    cancelled.cancel()
    future = requests.future_of(early)
    for name in ("early", "late"):
        replies.awaited.resolve(name, FleetError(name))

    assert requests.future_of(early) is future
    assert [str(future.result()), str(requests.future_of(late).result())] == ["early", "late"]
    assert len(replies.awaited) == 0


def test_what_another_process_or_loop_has_submitted_is_told_here_too() -> None:
    """It is looked up as well: its record goes to the stream of whoever submitted it."""
    there, here = Known(), Known()
    submitted = Submitted("a")
    there.add([submitted])
    elsewhere = Requests(Settings(), there, None).future_of(submitted)

    future = Requests(Settings(), here, None).future_of(submitted)
    assert future is not elsewhere
    assert here.awaited.elsewhere
    here.awaited.resolve("a", FleetError("told"))

    assert str(future.result()) == str(submitted.known) == "told"
    assert not elsewhere.done()
