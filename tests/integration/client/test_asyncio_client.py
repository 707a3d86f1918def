"""The client for asyncio: on the caller's loop, without threads, each task for itself."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
import redis

from producer import AsyncClient, RequestStatus
from shared import keys, wire
from shared.errors import BadRequest, Cancelled, ClientClosed, EngineError, NoEngineAvailable, QueueFull
from tests.support.fleet import FleetUnderTest
from tests.support.requests import ECHO


def with_client(fleet: FleetUnderTest, main: Callable[[AsyncClient], Coroutine[Any, Any, Any]], **options: Any) -> Any:
    """Run a coroutine function with a client."""

    async def run() -> Any:
        async with AsyncClient(settings=fleet.settings, **options) as client:
            return await main(client)

    return asyncio.run(run())


def test_two_thousand_waiting_submits_hold_no_thread(make_fleet) -> None:
    """They wait for a broker that is away, then for workers; none of them has a thread, and all are answered."""
    fleet = make_fleet()

    async def main(client: AsyncClient) -> list[str]:
        before = set(threading.enumerate())
        waiting = [
            asyncio.create_task(client.submit(model="echo", inputs={"prompt": f"p{n}"}, timeout=100))
            for n in range(2000)
        ]
        handles = await asyncio.gather(*waiting)
        results = [asyncio.create_task(handle.result()) for handle in handles]
        await asyncio.sleep(0.1)
        assert set(threading.enumerate()) == before
        starting = asyncio.create_task(asyncio.to_thread(fleet.start_worker))
        found = await asyncio.gather(*results)
        await starting
        return [result.text[::-1] for result in found]

    assert with_client(fleet, main) == [f"p{n}" for n in range(2000)]


def test_submits_that_wait_for_the_broker_hold_no_thread(make_fleet) -> None:
    """With ``on_outage="wait"`` any number of them wait on the loop; it stays free for others."""
    fleet = make_fleet()

    async def main(client: AsyncClient) -> None:
        before = set(threading.enumerate())
        waiting = [asyncio.create_task(client.submit(ECHO)) for _ in range(500)]
        await asyncio.sleep(0.5)
        assert set(threading.enumerate()) == before
        for task in waiting:
            task.cancel()
        ended = await asyncio.gather(*waiting, return_exceptions=True)
        assert {type(one) for one in ended} == {asyncio.CancelledError}

    settings = fleet.settings
    nowhere = settings.model_copy(
        update={"fleet": settings.fleet.model_copy(update={"redis_url": "redis://127.0.0.1:1/0"})}
    )

    async def run() -> None:
        async with AsyncClient(settings=nowhere, on_outage="wait") as client:
            await main(client)

    asyncio.run(run())


def test_a_task_that_is_cancelled_takes_nobody_along(make_fleet) -> None:
    """Others that wait for the same request or for another have their answers; so has whoever asks again."""
    fleet = make_fleet(optimization={"fake": {"latency_ms": 300}})
    fleet.start_worker()

    async def main(client: AsyncClient) -> list[str]:
        handle, other = await client.submit_many([ECHO, ECHO])
        same = await client.handle(handle.id)
        waiting = [asyncio.create_task(one.result()) for one in (handle, handle, same, other)]
        await asyncio.sleep(0.05)
        waiting[0].cancel()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(handle.result(), 0.01)
        with pytest.raises(TimeoutError):
            await handle.result(timeout=0)
        found = await asyncio.gather(*waiting[1:])
        return [result.text for result in [*found, await handle.result(), (await client.submit(ECHO)) and found[0]]]

    assert with_client(fleet, main) == ["olleh"] * 5


def test_submits_that_are_cancelled_harm_no_other(fleet: FleetUnderTest) -> None:
    """Wherever they are: the connection that all share goes on, and no answer comes to another's question."""

    async def main(client: AsyncClient) -> None:
        for turns in range(30):
            doomed = [asyncio.create_task(client.submit(ECHO)) for _ in range(5)]
            good = asyncio.create_task(client.submit(model="echo", inputs={"prompt": f"n{turns}"}))
            for _ in range(turns % 6):
                await asyncio.sleep(0)
            for task in doomed:
                task.cancel()
            handle = await good
            assert (await handle.result(4)).text == f"n{turns}"[::-1]
            assert await handle.status() is RequestStatus.SUCCEEDED

    with_client(fleet, main)


def test_a_map_under_a_timeout_goes_on(make_fleet) -> None:
    """A time limit on a result is a ``TimeoutError``, and asking again has the same result; none is lost or doubled."""
    fleet = make_fleet(optimization={"fake": {"latency_ms": 150}})
    fleet.start_worker()
    prompts = [f"p{n}" for n in range(300)]

    async def main(client: AsyncClient) -> list[str]:
        results = client.map(({"model": "echo", "inputs": {"prompt": prompt}} for prompt in prompts), window=100)
        found: list[str] = []
        timeouts = 0
        while True:
            try:
                found.append((await asyncio.wait_for(anext(results), 0.001)).text[::-1])
            except TimeoutError:
                timeouts += 1
            except StopAsyncIteration:
                break
        assert timeouts > 0
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(all_of(client.map([ECHO] * 5)), 0.05)
        return found

    async def all_of(results: AsyncIterator[Any]) -> list[Any]:
        return [outcome async for outcome in results]

    assert with_client(fleet, main) == prompts


def test_a_map_reads_an_asynchronous_source(fleet: FleetUnderTest) -> None:
    """Each result is there as soon as it can be: a source may wait for it before it goes on. Errors are in place."""
    seen: list[str] = []

    async def main(client: AsyncClient) -> None:
        answered = asyncio.Event()

        async def source() -> AsyncIterator[Any]:
            for number in range(5):
                yield {"model": "echo", "inputs": {"prompt": f"n{number}"}}
                async with asyncio.timeout(4):
                    await answered.wait()
                answered.clear()
            yield 5
            yield Cancelled("as given")

        async for outcome in client.map(source(), errors="yield"):
            seen.append(str(outcome) if isinstance(outcome, BadRequest | Cancelled) else outcome.text[::-1])
            answered.set()

        async def broken() -> AsyncIterator[Any]:
            yield ECHO
            raise ValueError("the source broke")

        with pytest.raises(ValueError, match="the source broke"):
            _ = [outcome async for outcome in client.map(broken())]
        everything = client.map(endless())
        assert (await anext(everything)).text == "olleh"
        await everything.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(everything)

    async def endless() -> AsyncIterator[Any]:
        while True:
            yield ECHO

    with_client(fleet, main)

    assert seen[:5] == [f"n{number}" for number in range(5)]
    assert seen[5].startswith("a request is")
    assert seen[6] == "as given"


def test_a_map_waits_for_room_and_yields_meanwhile(make_fleet) -> None:
    """A queue that is full holds up what is submitted, not the results that are there."""
    fleet = make_fleet(fleet={"queue_capacity": 40})
    fleet.start_worker()

    async def main(client: AsyncClient) -> int:
        with pytest.raises(QueueFull):
            await client.submit_many([ECHO] * 200)
        return len([outcome async for outcome in client.map([ECHO] * 300)])

    assert with_client(fleet, main) == 300


def test_headers_outages_and_errors_are_those_of_the_other_client(make_fleet, redis_client: redis.Redis) -> None:
    """Cancel, status, an id again, nobody to serve it, and results of another client's requests."""
    fleet = make_fleet()

    async def main(client: AsyncClient) -> None:
        with pytest.raises(NoEngineAvailable):
            await client.submit(ECHO)
        waiting = await client.submit({"id": "mine", **ECHO}, timeout=60)
        again = await client.submit({"id": "mine", **ECHO}, timeout=60)
        assert await waiting.cancel() is True
        assert await client.cancel("mine") is False
        for handle in (waiting, again):
            with pytest.raises(Cancelled):
                await handle.result(4)
        assert (waiting.done(), await client.status("mine")) == (True, RequestStatus.CANCELLED)
        assert await client.fleet() == []
        elsewhere = await client.handle("elsewhere")
        result = asyncio.create_task(elsewhere.outcome(4))
        await asyncio.sleep(0.1)
        redis_client.set(keys.result_key("elsewhere"), wire.failure_meta("elsewhere", EngineError("told")))
        assert str(await result) == "told"

    with_client(fleet, main, headers=lambda request: {"x-model": request.model})

    headers = [wire.decode_envelope(message)["headers"] for message in redis_client.lrange("fake\x06\x163", 0, -1)]
    assert [found["x-model"] for found in headers] == ["echo"]


def test_closing_tells_who_waits_and_who_comes_later(make_fleet, redis_client: redis.Redis) -> None:
    """At once, in words; what was answered before is known still, and the stream is gone."""
    fleet = make_fleet()

    async def main() -> None:
        client = AsyncClient(settings=fleet.settings)
        handle, ended = await client.submit_many([ECHO, ECHO], timeout=60)
        await ended.cancel()
        waiting = asyncio.create_task(handle.result())
        mapping = client.map([ECHO] * 3, timeout=60)
        await asyncio.sleep(0.05)
        await client.close()
        await client.close()
        for use in (waiting, client.submit(ECHO), handle.result(), handle.status(), client.fleet(), anext(mapping)):
            with pytest.raises(ClientClosed):
                await use
        with pytest.raises(ClientClosed):
            client.map([])
        assert isinstance(await ended.outcome(), Cancelled)

    asyncio.run(main())

    assert not redis_client.keys("muai:reply:*")


def test_one_loop_after_another(fleet: FleetUnderTest) -> None:
    """A client outlives its loop; a handle finds its answer from the next one."""
    client = AsyncClient(settings=fleet.settings)

    async def submit() -> Any:
        return await client.submit(ECHO)

    handle = asyncio.run(submit())
    for _ in range(3):
        assert asyncio.run(handle.result(4)).text == "olleh"
        assert asyncio.run(asyncio.wait_for(asyncio.run(submit()).result(), 4)).text == "olleh"

    assert len(client._sessions._made) <= 1
