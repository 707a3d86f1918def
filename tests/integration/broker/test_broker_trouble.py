"""Everything a broker can do wrong, and what producers and workers make of it."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import redis

from producer import AsyncClient, Client
from shared import keys
from shared.embedded import EmbeddedBroker, free_port
from shared.errors import BrokerFull, BrokerRefused, BrokerUnavailable, DeadlineExceeded
from shared.settings import Settings
from tests.support.fleet import FleetUnderTest
from tests.support.requests import ECHO
from tests.support.shell import muai
from tests.support.waiting import eventually

PATIENCE = 10.0
"""Seconds within which a producer is told what it ought to be told within one, whatever else its machine does.

Without our limits it takes longer: 12 to 19 s in a plain Celery producer, or until the broker is back.
"""


class Proxy:
    """A TCP proxy on loopback: lets connections go silent, and leads new ones elsewhere."""

    def __init__(self, target: int) -> None:
        self.target = target
        self._silent: set[socket.socket] = set()
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def half_open(self) -> None:
        """From now on nothing passes on the connections that are there; their ends do not learn of it."""
        self._silent.update(self._open)

    def close(self) -> None:
        self._listener.close()
        for end in self._open:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self.target))
                self._open += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if source not in self._silent:
                    sink.sendall(data)
            if source not in self._silent:
                sink.shutdown(socket.SHUT_WR)


@pytest.fixture
def own_broker(tmp_path: Path) -> Iterator[EmbeddedBroker]:
    """A broker that a test may do anything to."""
    with EmbeddedBroker(tmp_path / "own-broker", append_only=True) as own:
        yield own
        own.send_signal(signal.SIGCONT)


@pytest.fixture
def admin(own_broker: EmbeddedBroker) -> Iterator[redis.Redis]:
    """A connection of its own to that broker."""
    client = redis.Redis.from_url(own_broker.url)
    yield client
    client.close()


@pytest.fixture
def own_fleet(make_fleet, own_broker: EmbeddedBroker, tmp_path: Path) -> FleetUnderTest:
    """A fleet on that broker, without a worker yet."""
    spool = str(tmp_path / "spool.db")
    fleet: FleetUnderTest = make_fleet(fleet={"lease_seconds": 4, "sweep_seconds": 0.5, "spool_path": spool})
    fleet.url = own_broker.url
    return fleet


def settings_for(fleet: FleetUnderTest, **changes: object) -> Settings:
    """The fleet's settings with other values in the section ``fleet``."""
    settings = fleet.settings
    return settings.model_copy(update={"fleet": settings.fleet.model_copy(update=changes)})


@pytest.fixture
def black_hole() -> Iterator[int]:
    """A port on loopback that never completes a connection: its backlog is full."""
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for filler in (first, second):
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield int(listener.getsockname()[1])


# --- producers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["refused", "unresolvable", "black hole"])
def test_a_broker_that_is_not_there_is_said_within_a_second(make_fleet, black_hole: int, where: str) -> None:
    """One clear error, which knows that nothing was sent and carries the requests."""
    fleet = make_fleet()
    address = {
        "refused": f"127.0.0.1:{free_port()}",
        "unresolvable": "no-such-host.invalid:6379",
        "black hole": f"127.0.0.1:{black_hole}",
    }[where]
    with Client(f"redis://:geheim@{address}/0", fleet.settings) as client:
        started = time.monotonic()

        with pytest.raises(BrokerUnavailable, match="cannot list the workers.*does not answer") as caught:
            client.submit(ECHO)

        assert time.monotonic() - started < PATIENCE
    assert "geheim" not in str(caught.value)
    assert not caught.value.outcome_unknown
    assert [request.model for request in caught.value.requests] == ["echo"]


def test_a_frozen_broker_leaves_the_outcome_unknown_and_the_retry_safe(
    own_fleet: FleetUnderTest, own_broker: EmbeddedBroker, admin: redis.Redis
) -> None:
    """The submit fails within its socket timeout though it was carried out; submitting again does not run it twice."""
    own_fleet.start_worker()
    with Client(settings=settings_for(own_fleet, socket_timeout_seconds=1.0)) as client:
        client.submit(ECHO).result(10)
        own_broker.send_signal(signal.SIGSTOP)
        started = time.monotonic()

        with pytest.raises(BrokerUnavailable) as caught:
            client.submit(ECHO)
        took = time.monotonic() - started
        own_broker.send_signal(signal.SIGCONT)
        (handle,) = client.submit_many(caught.value.requests)

        assert took < PATIENCE
        assert handle.result(15).text == "olleh"
    assert caught.value.outcome_unknown
    assert handle.id == caught.value.requests[0].id
    assert admin.get(keys.LEASE_COUNTER) == b"2"


def test_what_a_broker_refuses_is_said_with_the_remedy_and_without_secrets(
    own_fleet: FleetUnderTest, own_broker: EmbeddedBroker, admin: redis.Redis
) -> None:
    """No password, a wrong one, no permission, a replica, a replica without its master: each in words of its own."""
    admin.execute_command("ACL", "SETUSER", "reader", "on", ">geheim", "~*", "+@read", "+script", "+eval", "+evalsha")
    admin.config_set("requirepass", "streng-geheim")
    address = own_broker.url.removeprefix("redis://")

    def told(credentials: str) -> BrokerUnavailable:
        client = Client(f"redis://{credentials}{address}", own_fleet.settings)
        with client, pytest.raises(BrokerUnavailable) as caught:
            client.cancel("some-request")
        assert "geheim" not in str(caught.value)
        assert not caught.value.outcome_unknown
        return caught.value

    assert "wants a password; put it into REDIS_URL" in str(told(""))
    assert "does not accept the user and password in REDIS_URL" in str(told("reader:falsch-geheim@"))
    assert "does not permit this" in str(refused := told("reader:geheim@"))
    assert isinstance(refused, BrokerRefused)
    admin.execute_command("AUTH", "streng-geheim")
    admin.execute_command("REPLICAOF", "127.0.0.1", str(free_port()))
    assert "read-only replica" in str(told(":streng-geheim@"))
    admin.config_set("replica-serve-stale-data", "no")
    assert "has lost its master" in str(told(":streng-geheim@"))


def test_outages_are_waited_for_or_spooled_where_that_was_chosen(
    own_fleet: FleetUnderTest, own_broker: EmbeddedBroker, admin: redis.Redis
) -> None:
    """Waiting and spooling clients take requests while the broker is down; all are answered after it is back.

    A handle from before the outage gets its answer too, and the worker is the same process.
    """
    worker = own_fleet.start_worker(environ={"MUAI_OPT_FAKE_LATENCY_MS": "300"})

    async def from_asyncio() -> str:
        async with AsyncClient(settings=own_fleet.settings, on_outage="wait") as client:
            return (await (await client.submit(ECHO)).result(30)).text

    with (
        Client(settings=own_fleet.settings, on_outage="wait") as waiting,
        Client(settings=own_fleet.settings, on_outage="spool") as spooling,
        ThreadPoolExecutor(2) as pool,
    ):
        before = spooling.submit(ECHO)
        eventually(lambda: admin.zcard(keys.LEASE_INDEX) == 1)
        own_broker.kill()
        waited = pool.submit(waiting.submit, ECHO)
        awaited = pool.submit(asyncio.run, from_asyncio())
        spooled = [spooling.submit(ECHO) for _ in range(5)]
        with pytest.raises(BrokerUnavailable):
            waiting.submit(ECHO, timeout=0.5)
        own_broker.start()

        texts = [handle.result(60).text for handle in (waited.result(60), before, *spooled)]

        assert [*texts, awaited.result(60)] == ["olleh"] * 8
    assert worker.poll() is None


def test_a_deadline_ends_the_wait_for_an_answer(own_fleet: FleetUnderTest, own_broker: EmbeddedBroker) -> None:
    """A handle whose request is late does not wait for the broker for ever."""
    own_fleet.start_worker(environ={"MUAI_OPT_FAKE_LATENCY_MS": "60000"})
    handle = own_fleet.client.submit(ECHO, timeout=1.0)
    own_broker.kill()

    with pytest.raises(DeadlineExceeded, match="the broker is away"):
        handle.result(30)


def test_the_spool_is_looked_at_sent_and_dropped_from_the_shell(
    own_fleet: FleetUnderTest, own_broker: EmbeddedBroker
) -> None:
    """``muai spool list``, ``send`` and ``drop``: what a client left behind is there for the next process."""
    before = muai(own_fleet, "spool", "list")
    own_broker.kill()
    with Client(settings=own_fleet.settings, on_outage="spool") as client:
        for name in ("one", "two", "three"):
            client.submit({"id": name, **ECHO})
    own_broker.start()
    own_fleet.start_worker()

    listed = muai(own_fleet, "spool", "list")
    dropped = muai(own_fleet, "spool", "drop", "two")
    sent = muai(own_fleet, "spool", "send")
    after = muai(own_fleet, "spool", "list")

    assert (before[0], "the spool is empty: there is no file" in before[1]) == (0, True)
    assert [name in listed[1] for name in ("one", "two", "three", "hello")] == [True, True, True, False]
    assert dropped[:2] == (0, "1 dropped\n")
    assert sent[:2] == (0, "2 sent, 0 left\n")
    assert after[:2] == (0, "the spool is empty\n")
    assert own_fleet.client.handle("three").result(10).text == "olleh"


# --- workers ------------------------------------------------------------------------------------------------------


def test_a_full_broker_refuses_producers_and_lets_workers_empty_it(
    own_fleet: FleetUnderTest, admin: redis.Redis
) -> None:
    """Without memory nothing is accepted, but what waits is answered; with room again all is as before."""
    worker = own_fleet.start_worker(environ={"MUAI_OPT_FAKE_LATENCY_MS": "200"})
    own_fleet.client.submit(ECHO).result(10)
    handles = [own_fleet.client.submit(ECHO) for _ in range(20)]
    admin.config_set("maxmemory", int(admin.info("memory")["used_memory"]) - 100_000)

    with pytest.raises(BrokerFull, match="raise its maxmemory"):
        own_fleet.client.submit(ECHO)
    with pytest.raises(BrokerFull):
        own_fleet.client.submit(ECHO)
    admin.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")  # also those who connect anew
    assert [handle.result(20).text for handle in handles] == ["olleh"] * 20
    assert len(own_fleet.client.fleet()) == 1
    admin.config_set("maxmemory", 0)
    assert own_fleet.client.submit(ECHO).result(30).text == "olleh"
    assert worker.poll() is None


@pytest.mark.parametrize("how", ["half-open", "frozen", "failover"])
@pytest.mark.timeout(120)
def test_workers_go_on_by_themselves(
    own_fleet: FleetUnderTest, own_broker: EmbeddedBroker, admin: redis.Redis, tmp_path: Path, how: str
) -> None:
    """Connections that went silent, a broker that froze for a while, a master that became a replica: all pass."""
    proxy = Proxy(own_broker.port)
    own_fleet.url = f"redis://127.0.0.1:{proxy.port}/0"
    worker = own_fleet.start_worker()
    other = EmbeddedBroker(tmp_path / "other")
    try:
        own_fleet.client.submit(ECHO).result(10)
        if how == "half-open":
            proxy.half_open()
        elif how == "frozen":
            own_broker.send_signal(signal.SIGSTOP)
            eventually(lambda: "does not answer" in own_fleet.log(worker) or "lost" in own_fleet.log(worker), 30)
            own_broker.send_signal(signal.SIGCONT)
        else:
            other.start()
            proxy.target = other.port
            admin.execute_command("REPLICAOF", "127.0.0.1", str(other.port))

        with Client(settings=own_fleet.settings, on_outage="wait") as fresh:
            assert fresh.submit(ECHO, timeout=60).result(60).text == "olleh"
        # The client that was there all the time finds its way as well.
        handle = eventually(lambda: submitted(own_fleet.client))
        assert handle.result(60).text == "olleh"
    finally:
        proxy.close()
        other.stop()
    assert worker.poll() is None


def submitted(client: Client):
    with suppress(BrokerUnavailable):
        return client.submit(ECHO, timeout=60)
    return None


def test_a_worker_says_once_what_its_broker_would_lose(own_fleet: FleetUnderTest, admin: redis.Redis) -> None:
    """Eviction and missing persistence are warned of at the start, with the command that mends them.

    A worker that may not ask goes on without.
    """
    admin.config_set("appendonly", "no")
    admin.config_set("maxmemory", "1gb")
    admin.config_set("maxmemory-policy", "allkeys-lru")
    worker = own_fleet.start_worker(environ={"MUAI_FLEET_HEARTBEAT_SECONDS": "0.1"})

    own_fleet.client.submit(ECHO).result(10)

    log = own_fleet.log(worker)
    assert log.count("a full broker would drop requests. Remedy: redis-cli") == 1
    assert log.count("what waits is lost when the broker dies") == 1
    admin.execute_command("ACL", "SETUSER", "default", "-info")
    silent = own_fleet.start_worker()
    for process in own_fleet.processes:
        process.terminate()
        process.wait(30)
    assert own_fleet.client.fleet() == []
    assert "Remedy" not in own_fleet.log(silent)
