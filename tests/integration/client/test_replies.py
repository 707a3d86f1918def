"""Who reads a client's results: whoever waits, and the client's own thread for those who do not."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import redis

from producer.client.records import Outcome
from producer.client.replies import ReplyReader
from shared import wire
from shared.embedded import EmbeddedBroker
from shared.errors import ClientClosed, EngineError
from shared.settings import FleetSettings
from tests.support.waiting import eventually


@pytest.fixture
def replies(broker: EmbeddedBroker, redis_client: redis.Redis) -> Iterator[ReplyReader]:
    """A client's reader."""
    reader = ReplyReader(FleetSettings(redis_url=broker.url), "me")
    yield reader
    reader.close()
    assert redis_client.exists(reader.stream) == 0


@pytest.fixture
def answer(redis_client: redis.Redis, replies: ReplyReader) -> Callable[[str], None]:
    """Answers a request by its id, as a worker does."""

    def write(request_id: str) -> None:
        redis_client.xadd(replies.stream, {"m": wire.failure_meta(request_id, EngineError(request_id))})

    return write


def test_who_waits_reads_the_answer(replies: ReplyReader, answer: Callable[[str], None]) -> None:
    """In its own thread, and those of others with it."""
    first, second = replies.expect(["first", "second"])
    readers: list[int] = []
    first.when_done(lambda: readers.append(threading.get_ident()))  # type: ignore[attr-defined]
    answer("second")
    answer("first")

    outcome = first.result(10)

    assert str(outcome) == "first"
    assert second.done()
    assert readers == [threading.get_ident()]


def test_a_patience_that_ends_is_kept_to(replies: ReplyReader, answer: Callable[[str], None]) -> None:
    """The answer that comes later is had by the next who asks."""
    (future,) = replies.expect(["slow"])
    for timeout in (0, 0.01, 0.05):
        with pytest.raises(TimeoutError):
            future.result(timeout)

    answer("slow")

    assert str(future.result(10)) == "slow"


def test_many_threads_wait_for_one_answer_each(replies: ReplyReader, answer: Callable[[str], None]) -> None:
    """Whoever reads hands on what is not its own, and the reading, when it has what it wants."""
    names = [f"r{number}" for number in range(64)]
    futures = replies.expect(names)

    def wait(future: Future[Outcome]) -> str:
        return str(future.result(60))

    with ThreadPoolExecutor(16) as pool:
        waiting = [pool.submit(wait, future) for future in futures]
        for name in reversed(names):
            answer(name)
            time.sleep(0.001)
        found = [one.result(60) for one in waiting]

    assert found == names


def test_an_answer_nobody_waits_for_is_read_all_the_same(replies: ReplyReader, answer: Callable[[str], None]) -> None:
    """After a while, again and again, also after the client was not used for long."""
    for name in ("a", "b"):
        (future,) = replies.expect([name])
        answer(name)
        eventually(future.done, 10)
        eventually(lambda: replies._parked, 10)


def test_who_asks_to_be_called_back_is(replies: ReplyReader, answer: Callable[[str], None]) -> None:
    """So asyncio waits for results; others may wait in threads meanwhile."""
    names = [f"r{number}" for number in range(20)]
    futures = replies.expect([*names, "thread"])

    async def all_of_them() -> list[Outcome]:
        return await asyncio.gather(*(asyncio.wrap_future(future) for future in futures[:-1]))

    with ThreadPoolExecutor(2) as pool:
        awaited = pool.submit(asyncio.run, all_of_them())
        waited = pool.submit(futures[-1].result, 30)
        for name in [*names, "thread"]:
            answer(name)
            time.sleep(0.002)
        outcomes = awaited.result(30)

        assert [str(outcome) for outcome in outcomes] == names
        assert str(waited.result(30)) == "thread"


def test_closing_does_not_wait_for_who_reads(broker: EmbeddedBroker) -> None:
    """Neither a thread that waits for a result nor our own holds it up; who waits is told, and who comes later too."""
    reader = ReplyReader(FleetSettings(redis_url=broker.url), "closed")
    waits, called = reader.expect(["waits", "called"])
    called.add_done_callback(lambda _: None)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(waits.result, 3)
        eventually(lambda: reader._turns.taken, 10)

        reader.close()

        with pytest.raises(ClientClosed):
            waiting.result(10)
        with pytest.raises(ClientClosed):
            called.result(0)
    (later,) = reader.expect(["later"])
    with pytest.raises(ClientClosed):
        later.result(10)


def test_a_connection_that_was_closed_meanwhile_is_made_anew(
    replies: ReplyReader, answer: Callable[[str], None], redis_client: redis.Redis
) -> None:
    """Nothing is lost: reading goes on where it was."""
    for name in ("before", "after"):
        (future,) = replies.expect([name])
        answer(name)
        assert str(future.result(10)) == name
        redis_client.client_kill_filter(_type="normal", skipme=True)
