"""A client that was made before a fork: a server that preloads its application, or a pool of processes."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from producer import AsyncClient, Client
from producer.client.records import POLL_SECONDS
from tests.support.fleet import FleetUnderTest
from tests.support.forks import Child
from tests.support.requests import ECHO
from tests.support.waiting import eventually

PATIENCE = 0.8 * POLL_SECONDS
"""An answer that is read as it comes is there by then; one that is only looked up is not."""


def ask(client: Client, name: str, count: int = 20) -> list[str]:
    """Ask for so many answers of the client's own, and return those that are."""
    prompts = [f"{name}-{number}" for number in range(count)]
    texts = [client.submit(model="echo", inputs={"prompt": prompt}).result(PATIENCE).text[::-1] for prompt in prompts]
    together = client.submit_many([{"model": "echo", "inputs": {"prompt": prompt}} for prompt in prompts])
    assert [handle.result(PATIENCE).text[::-1] for handle in together] == prompts
    assert [found.text for found in client.map([ECHO] * 100)] == ["olleh"] * 100
    return texts


def asked(name: str, count: int = 20) -> list[str]:
    """What :func:`ask` returns."""
    return [f"{name}-{number}" for number in range(count)]


@pytest.fixture
def client(fleet: FleetUnderTest) -> Iterator[Client]:
    """A client that has been used."""
    with Client(settings=fleet.settings) as used:
        ask(used, "before")
        yield used


def test_children_and_their_parent_use_a_client_at_once(client: Client) -> None:
    """Each has its own answers, as fast as before the fork, while threads are reading and submitting meanwhile."""
    done = threading.Event()

    def work(number: int) -> int:
        rounds = 0
        while not done.is_set():
            assert ask(client, f"thread{number}", 3) == asked(f"thread{number}", 3)
            rounds += 1
        return rounds

    with ThreadPoolExecutor(3) as pool:
        working = [pool.submit(work, number) for number in range(3)]
        children = []
        for number in range(6):
            children.append(Child(lambda number=number: ask(client, f"child{number}")))
            time.sleep(0.02)
        answers = [child.value() for child in children]
        done.set()

        assert answers == [asked(f"child{number}") for number in range(6)]
        assert all(one.result(60) for one in working)
    assert ask(client, "after") == asked("after")


def test_many_threads_of_a_child_share_what_it_makes(client: Client) -> None:
    """The first use of several threads at once makes one set of connections and one stream."""

    def work() -> list[object]:
        barrier = threading.Barrier(8)

        def one(number: int) -> list[str]:
            barrier.wait(10)
            return ask(client, f"t{number}", 5)

        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(one, range(8)))
        return [found, len([thread for thread in threading.enumerate() if thread.name == "muai-replies"])]

    assert Child(work).value() == [[asked(f"t{number}", 5) for number in range(8)], 1]


def test_a_pool_of_processes(client: Client) -> None:
    """``multiprocessing`` with its fork method, as it is started by default on Linux."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    started = [context.Process(target=lambda n=n: results.put(ask(client, f"p{n}"))) for n in range(3)]
    for process in started:
        process.start()
    found = sorted(results.get(timeout=60) for _ in started)
    for process in started:
        process.join(60)

    assert found == sorted(asked(f"p{n}") for n in range(3))
    assert [process.exitcode for process in started] == [0, 0, 0]


def test_a_child_of_a_child(client: Client) -> None:
    """Each generation has its own."""

    def work() -> list[list[str]]:
        first = ask(client, "child")
        return [first, Child(lambda: ask(client, "grandchild")).value(), ask(client, "child")]

    assert Child(work).value() == [asked("child"), asked("grandchild"), asked("child")]


def test_handles_of_the_parent_are_good_in_the_child(make_fleet) -> None:
    """Answered before the fork or after it; and what the child does with them does not disturb the parent."""
    fleet = make_fleet(optimization={"fake": {"latency_ms": 700}})
    fleet.start_worker()
    client = fleet.client
    before = client.submit(ECHO)
    before.result(10)
    open_ones = client.submit_many([ECHO] * 3)
    called: list[str] = []
    open_ones[2].future.add_done_callback(lambda future: called.append(future.result().text))

    def work() -> list[object]:
        found = [handle.result(PATIENCE).text for handle in (before, *open_ones)]
        return [found, [handle.future.result(1).text for handle in open_ones], before.done()]

    child = Child(work)

    assert child.value() == [["olleh"] * 4, ["olleh"] * 3, True]
    assert [handle.result(PATIENCE).text for handle in open_ones] == ["olleh"] * 3
    eventually(lambda: called == ["olleh"])


def test_a_map_goes_on_in_the_child(client: Client) -> None:
    """What was under way is found, what comes after it is submitted by the child."""
    going = client.map([ECHO] * 200, window=80)
    next(going)

    found = Child(lambda: [outcome.text for outcome in going]).value()

    assert found == ["olleh"] * 199


def test_a_child_that_closes_the_client_closes_its_own(client: Client) -> None:
    """The parent's waits go on, and its stream is still there; a client that was closed before the fork stays so."""

    def closed() -> str:
        client.close()
        try:
            client.submit(ECHO)
        except RuntimeError as error:
            return str(error)
        return "no error"

    def used_and_closed() -> str:
        ask(client, "child")
        return closed()

    assert Child(closed).value() == "The client is closed."
    assert Child(used_and_closed).value() == "The client is closed."
    assert ask(client, "after") == asked("after")


def test_an_asyncio_client_made_before_the_fork(fleet: FleetUnderTest) -> None:
    """It belongs to no loop until it is used: children and parent each use it on loops of their own."""
    client = AsyncClient(settings=fleet.settings)

    async def ask_async(name: str) -> list[str]:
        handles = [await client.submit(model="echo", inputs={"prompt": prompt}) for prompt in asked(name)]
        found = await asyncio.gather(*(handle.result(PATIENCE) for handle in handles))
        assert [outcome.text async for outcome in client.map([ECHO] * 100)] == ["olleh"] * 100
        return [result.text[::-1] for result in found]

    assert asyncio.run(ask_async("before")) == asked("before")
    children = [Child(lambda n=n: asyncio.run(ask_async(f"child{n}"))) for n in range(3)]
    assert asyncio.run(ask_async("parent")) == asked("parent")
    assert [child.value() for child in children] == [asked(f"child{n}") for n in range(3)]


def test_a_spooling_client_after_a_fork(fleet: FleetUnderTest) -> None:
    """The child opens the spool's file for itself, and delivers."""
    with Client(settings=fleet.settings, on_outage="spool") as client:
        ask(client, "before")

        assert Child(lambda: ask(client, "child")).value() == asked("child")
        assert ask(client, "after") == asked("after")
