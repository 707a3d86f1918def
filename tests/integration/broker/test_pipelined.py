"""Scripts that are not waited for, on a real broker and a real loop."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from kombu.asynchronous import Hub

from shared.broker import connect
from shared.embedded import EmbeddedBroker
from shared.settings import FleetSettings
from tests.support.waiting import eventually
from workers.broker.pipelined import PipelinedScripts

ECHO = """
if ARGV[1] == 'refused' then return redis.error_reply('no') end
redis.call('INCR', KEYS[1])
return ARGV[1]
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A loop."""
    hub = Hub()
    yield hub
    hub.close()


class Scripts:
    """A pipeline on a broker, and what has become of each script that was sent."""

    def __init__(self, broker: EmbeddedBroker, **limits: float) -> None:
        self.client = connect(FleetSettings(redis_url=broker.url, **limits))
        self.scripts = PipelinedScripts(self.client)
        self.script = self.client.register_script(ECHO)
        self.seen: list[str] = []

    def send(self, *words: str, then: Callable[[], Any] = lambda: None) -> None:
        """Send a script for each word; ``then`` is called when its answer has come."""
        for word in words:

            def answered(answer: bytes) -> None:
                self.seen.append(answer.decode())
                then()

            self.scripts.run(
                self.script, ["runs"], [word], answered, lambda word=word: self.seen.append(f"lost {word}")
            )

    def runs(self, broker: EmbeddedBroker) -> int:
        """How many scripts the broker has run."""
        with redis.Redis.from_url(broker.url) as client:
            return int(client.get("runs") or 0)


@pytest.fixture
def own(tmp_path: Path) -> Iterator[EmbeddedBroker]:
    """A broker that a test may do anything to."""
    with EmbeddedBroker(tmp_path / "own") as broker:
        yield broker


def test_answers_come_in_order_while_the_loop_goes_on(broker, redis_client, hub: Hub) -> None:
    """Also those of scripts that answers give rise to, and where the broker has forgotten the script meanwhile."""
    scripts = Scripts(broker)
    scripts.scripts.attach(hub)
    scripts.send("warm")
    eventually(lambda: next(hub.loop) or scripts.seen)

    scripts.send("a", then=lambda: scripts.send("c"))
    scripts.send("b")
    assert scripts.seen == ["warm"]
    eventually(lambda: next(hub.loop) or len(scripts.seen) == 4)
    redis_client.script_flush()
    scripts.send("d", "e")
    scripts.scripts.wait()

    assert scripts.seen == ["warm", "a", "b", "c", "d", "e"]
    assert scripts.runs(broker) == 6
    scripts.scripts.detach()


def test_without_a_loop_each_script_is_waited_for(broker, redis_client, hub: Hub) -> None:
    """When the loop is over, what is under way is taken in."""
    scripts = Scripts(broker)
    scripts.send("before")
    assert scripts.seen == ["before"]

    scripts.scripts.attach(hub)
    scripts.send("a", "b")
    assert scripts.seen == ["before"]
    scripts.scripts.detach()
    assert scripts.seen == ["before", "a", "b"]

    scripts.send("after")
    assert scripts.seen == ["before", "a", "b", "after"]
    assert len(hub.readers) == 0


def test_a_connection_that_ends_loses_what_was_under_way(own: EmbeddedBroker, hub: Hub) -> None:
    """All of it, the last first, so that each can be put before those that came after. Then it connects anew."""
    scripts = Scripts(own)
    scripts.scripts.attach(hub)
    scripts.send("a")
    scripts.scripts.wait()
    own.send_signal(signal.SIGSTOP)
    scripts.send("b", "c")
    own.kill()

    with pytest.raises(redis.ConnectionError):
        eventually(lambda: next(hub.loop))

    assert scripts.seen == ["a", "lost c", "lost b"]
    with pytest.raises(redis.ConnectionError):
        scripts.send("nobody there")
    own.start()
    hub.reset()
    loop = hub.create_loop()
    scripts.scripts.attach(hub)
    scripts.send("d")
    eventually(lambda: next(loop) or scripts.seen[-1] == "d")
    scripts.scripts.detach()


def test_a_broker_that_does_not_answer_is_not_waited_for_for_ever(own: EmbeddedBroker, hub: Hub) -> None:
    """The time limit is that of every command."""
    scripts = Scripts(own, socket_timeout_seconds=0.3)
    scripts.scripts.attach(hub)
    scripts.send("a")
    scripts.scripts.wait()
    own.send_signal(signal.SIGSTOP)
    try:
        scripts.send("b")
        with pytest.raises(redis.TimeoutError):
            scripts.scripts.wait()
    finally:
        own.send_signal(signal.SIGCONT)

    assert scripts.seen == ["a", "lost b"]
    scripts.send("c")
    scripts.scripts.wait()
    assert scripts.seen[-1] == "c"
    scripts.scripts.detach()


def test_a_new_loop_leaves_a_connection_that_has_gone_silent(own: EmbeddedBroker, hub: Hub) -> None:
    """What is under way on it is not waited for as long as a command may take. An answer that is there is taken in."""
    scripts = Scripts(own, socket_timeout_seconds=60)
    scripts.scripts.attach(hub)
    scripts.send("a", "b")
    scripts.scripts.attach(hub)
    scripts.scripts.wait()
    assert scripts.seen == ["a", "b"]

    own.send_signal(signal.SIGSTOP)
    try:
        scripts.send("c")
        scripts.scripts.attach(hub)
        assert scripts.seen == ["a", "b", "lost c"]
    finally:
        own.send_signal(signal.SIGCONT)
    scripts.send("d")
    scripts.scripts.wait()
    assert scripts.seen[-1] == "d"
    scripts.scripts.detach()


def test_an_idle_connection_that_is_closed_is_made_anew(own: EmbeddedBroker, hub: Hub) -> None:
    """Nothing was under way, so nothing is lost and nothing raised."""
    scripts = Scripts(own)
    scripts.scripts.attach(hub)
    scripts.send("a")
    scripts.scripts.wait()
    with redis.Redis.from_url(own.url) as client:
        client.client_kill_filter(_type="normal", skipme=True)
    eventually(lambda: next(hub.loop) or not hub.readers)

    scripts.send("b")
    scripts.scripts.wait()

    assert scripts.seen == ["a", "b"]
    scripts.scripts.detach()


def test_a_connection_that_does_not_take_an_idle_ones_script_is_made_anew(own: EmbeddedBroker, hub: Hub) -> None:
    """The loop has not noticed yet that it has ended: nothing was under way, so nothing is lost and nothing raised."""
    scripts = Scripts(own)
    scripts.scripts.attach(hub)
    scripts.send("a")
    scripts.scripts.wait()
    scripts.scripts.socket.shutdown(socket.SHUT_WR)

    scripts.send("b")
    scripts.scripts.wait()

    assert scripts.seen == ["a", "b"]
    assert scripts.runs(own) == 2
    scripts.scripts.detach()


def test_without_a_loop_a_closed_connection_is_made_anew(own: EmbeddedBroker) -> None:
    """As above, where nobody watches the connection between two scripts."""
    scripts = Scripts(own)
    scripts.send("a")
    with redis.Redis.from_url(own.url) as client:
        client.client_kill_filter(_type="normal", skipme=True)

    scripts.send("b")

    assert scripts.seen == ["a", "b"]
    scripts.scripts.close()


def test_what_the_broker_refuses_is_lost_alone(broker, redis_client, hub: Hub) -> None:
    """The error is raised where the answer is taken in; those behind it still come."""
    scripts = Scripts(broker)
    scripts.scripts.attach(hub)
    scripts.send("a", "refused", "b")

    with pytest.raises(redis.ResponseError):
        scripts.scripts.wait()
    scripts.scripts.wait()

    assert scripts.seen == ["a", "lost refused", "b"]
    scripts.scripts.detach()
