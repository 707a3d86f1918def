"""A client from its making to its closing: what it keeps, and what it says when it is used otherwise."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest

from producer import AsyncClient, Client
from producer.client.records import POLL_SECONDS
from shared import keys
from shared.errors import BadRequest, BrokerRefused, ClientClosed, QueueFull
from tests.support.fleet import FleetUnderTest
from tests.support.requests import ECHO
from tests.support.waiting import eventually

PATIENCE = 0.8 * POLL_SECONDS


def repacked(value: object) -> object:
    """The value as another process would have it."""
    return pickle.loads(pickle.dumps(value))  # noqa: S301  # our own


def test_a_future_that_is_cancelled_is_its_own_waiters_only(make_fleet) -> None:
    """Others have their answers as they come, of the same request as well; so has the handle when it is asked again."""
    fleet = make_fleet(optimization={"fake": {"latency_ms": 300}})
    fleet.start_worker()
    first, other = fleet.client.submit_many([{"id": "one", **ECHO}, ECHO])
    (same,) = fleet.client.submit_many([{"id": "one", **ECHO}])
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(handle.result, PATIENCE) for handle in (same, other)]
        future = first.future
        assert future.cancel()
        with pytest.raises(CancelledError):
            future.result(1)

        assert [one.result(10).text for one in waiting] == ["olleh"] * 2
    assert first.result(PATIENCE).text == "olleh"
    assert fleet.client.submit(ECHO).result(PATIENCE).text == "olleh"

    async def given_up() -> None:
        handle = fleet.client.submit(ECHO)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(handle.future), 0.01)
        assert handle.result(PATIENCE).text == "olleh"

    asyncio.run(given_up())


def test_nothing_is_kept_of_what_nobody_waits_for(make_fleet) -> None:
    """Unknown ids, refused submits and resubmits, dropped handles; who waits for the same id is not disturbed."""
    fleet = make_fleet(fleet={"queue_capacity": 10})
    worker = fleet.start_worker()
    with Client(settings=fleet.settings) as client:
        for number in range(100):
            client.handle(f"unknown-{number}")
            with pytest.raises(TimeoutError):
                client.handle("unknown").result(0)
        kept = client.submit({"id": "kept", **ECHO}, timeout=60)
        for _ in range(5):
            with pytest.raises(QueueFull):
                client.submit_many([{"id": "kept", **ECHO}, *[ECHO] * 200])
        gc.collect()

        assert len(client._session.replies.awaited) <= 1
        assert kept.result(PATIENCE).text == "olleh"
        called: list[str] = []
        client.submit(ECHO).future.add_done_callback(lambda future: called.append(future.result().text))
        eventually(lambda: called == ["olleh"], what="the call")
        gc.collect()
        assert len(client._session.replies.awaited) == 0
    assert worker.poll() is None


def test_a_closed_client_says_so_at_once(fleet: FleetUnderTest) -> None:
    """Whatever is asked of it, and to whoever waits; what was answered before is known still."""
    client = Client(settings=fleet.settings)
    answered = client.submit(ECHO)
    answered.result(10)
    unknown = client.handle("unknown")
    mapping = client.map([ECHO] * 1000, window=100)
    next(mapping)
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(unknown.result, timeout) for timeout in (None, 60)]
        eventually(lambda: client._session.replies._turns.taken, what="who waits")

        client.close()

        for one in waiting:
            with pytest.raises(ClientClosed):
                one.result(PATIENCE)
    client.close()
    uses = [
        lambda: client.submit(ECHO), lambda: client.submit_many([]), lambda: client.map([]), lambda: next(mapping),
        lambda: client.handle("x"), lambda: client.status("x"), lambda: client.cancel("x"), lambda: client.recover("x"),
        client.fleet, client.dead_letters, client.queue_lengths, unknown.result, unknown.status, unknown.cancel,
        lambda: unknown.future.result(),
    ]  # fmt: skip
    for use in uses:
        with pytest.raises(ClientClosed, match=r"The client is closed\."):
            use()
    assert answered.result().text == "olleh"
    assert issubclass(ClientClosed, RuntimeError)


def test_whoever_waits_for_the_broker_is_let_go_when_the_client_is_closed(make_fleet) -> None:
    """``on_outage="wait"`` waits no longer than the client is open."""
    settings = make_fleet().settings
    nowhere = settings.model_copy(
        update={"fleet": settings.fleet.model_copy(update={"redis_url": "redis://127.0.0.1:1/0"})}
    )
    client = Client(settings=nowhere, on_outage="wait")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.submit, ECHO)
        time.sleep(0.2)
        client.close()

        with pytest.raises(ClientClosed):
            waiting.result(PATIENCE)


@pytest.mark.parametrize("of", ["a client", "a handle", "an asyncio client"])
def test_what_cannot_be_pickled_names_the_way(fleet: FleetUnderTest, of: str) -> None:
    """A handle is bound to its client; its id is not."""
    handle = fleet.client.submit(ECHO)
    value = {"a client": fleet.client, "a handle": handle, "an asyncio client": AsyncClient(fleet.url, fleet.settings)}

    for pack in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match=r"handle\.id.*client\.handle\(id\)"):
            pack(value[of])
    assert fleet.client.handle(repacked(handle.id)).result(PATIENCE).text == "olleh"
    result = handle.result(PATIENCE)
    assert repacked(result) == result


def test_a_choice_that_there_is_not_is_the_callers_error(fleet: FleetUnderTest) -> None:
    """It is not taken for another one: at the call, with those that there are."""
    with pytest.raises(BadRequest, match="on_outage is one of raise, wait, spool"):
        Client(settings=fleet.settings, on_outage="retry")  # type: ignore[arg-type]
    with pytest.raises(BadRequest, match="errors is one of raise, yield"):
        fleet.client.map([ECHO], errors="ignore")  # type: ignore[arg-type]
    with pytest.raises(BadRequest, match="errors is one of raise, yield"):
        AsyncClient(settings=fleet.settings).map([ECHO], errors="ignore")  # type: ignore[arg-type]


def test_a_password_that_the_broker_does_not_have_is_no_outage(fleet: FleetUnderTest) -> None:
    """It does not pass by itself: it is refused, and the error says what to leave out."""
    url = fleet.url.replace("redis://", "redis://:secret@")

    with Client(url, fleet.settings) as client, pytest.raises(BrokerRefused, match="has no password") as raised:
        client.submit(ECHO)

    assert "secret" not in str(raised.value)


def test_a_map_yields_its_first_result_as_soon_as_it_is_there(fleet: FleetUnderTest) -> None:
    """Before the window is full, and before a slow source has gone on; while it waits for room as well."""
    read: list[int] = []

    def source(pause: float) -> Iterator[dict]:
        for number in range(3000):
            read.append(number)
            time.sleep(pause)
            yield ECHO

    assert next(fleet.client.map(source(0.0), window=3000)).text == "olleh"
    assert len(read) < 3000
    read.clear()
    assert next(fleet.client.map(source(0.1), window=3000)).text == "olleh"
    assert len(read) < 20


def test_reading_threads_end_with_their_client(fleet: FleetUnderTest) -> None:
    """None is left."""
    before = threading.active_count()
    for _ in range(3):
        with Client(settings=fleet.settings) as client:
            client.submit(ECHO).result(10)

    assert threading.active_count() == before
    assert not fleet.client._redis.exists(keys.reply_stream("x"))
