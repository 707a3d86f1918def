"""Pipelining: scripts are sent to the broker one behind the other, and the loop goes on with its work meanwhile.

The answers come in the order of the questions, and are taken in when the loop finds them on the connection. Without a
loop each script is waited for.

The connection also brings news. The broker remembers which keys its scripts have read ("client-side caching"), and says
once when somebody else changes one of them.
"""

from __future__ import annotations

import select
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakSet

import hiredis
import redis
from kombu.asynchronous import Hub
from redis.commands.core import Script
from redis.exceptions import NoScriptError, ReadOnlyError, ResponseError

PATIENCE_SECONDS = 0.5
"""How long a connection may say nothing to what was asked before another was made."""

READ_BYTES = 65536

_NOTHING = object()
"""What the parser says while an answer is not complete."""


class Listener(Protocol):
    """Wants to know what has changed in the broker."""

    def changed(self, names: Collection[bytes] | None) -> None:
        """These keys have; ``None``: any may have."""

    def freed(self) -> None:
        """Requests of tenants have ended here."""


@dataclass(frozen=True, slots=True, eq=False)
class _Sent:
    """A script whose answer is on its way, and what follows."""

    script: Script
    keys: Sequence[str]
    args: Sequence[Any]
    then: Callable[[Any], None]
    lost: Callable[[], None]


class PipelinedScripts:
    """One connection with several scripts under way. For one thread only, that of the loop where there is one.

    What the broker or the connection raises is raised where the answer is taken in: by :meth:`run` and :meth:`wait`, or
    into the loop.
    """

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._connection: Any = None
        self._sock: Any = None
        self._parser: Any = None
        self._hub: Hub | None = None
        self._under_way: deque[_Sent] = deque()
        self._listeners: WeakSet[Listener] = WeakSet()

    @property
    def attached(self) -> bool:
        """Whether a loop takes the answers in."""
        return self._hub is not None

    @property
    def socket(self) -> Any:
        """Where answers and news come; ``None`` while there is no connection."""
        return self._sock

    def tell(self, listener: Listener) -> None:
        """Tell it the news for as long as it exists. After a loss of the connection, any key may have changed."""
        self._listeners.add(listener)

    def attach(self, hub: Hub) -> None:
        """From now on this loop takes the answers in.

        A loop begins with a connection to the broker. One from before that says nothing now has gone silent.
        """
        self._hub = hub
        self._client.connection_pool.disconnect(inuse_connections=False)
        with suppress(redis.ConnectionError):
            if not self._under_way or not self._more(PATIENCE_SECONDS):
                self._leave()
        if self._connection is not None:
            hub.add_reader(self._sock, self.readable)
            hub.call_soon(self._take_parsed)

    def detach(self) -> None:
        """The loop is over: take in what is under way, and wait for each script from now on."""
        if self._connection is not None:
            # The time limit may have changed.
            self._sock.settimeout(self._client.connection_pool.connection_kwargs["socket_timeout"])
        try:
            self.wait()
        finally:
            self._leave()
            self._hub = None

    def run(
        self,
        script: Script,
        keys: Sequence[str],
        args: Sequence[Any],
        then: Callable[[Any], None],
        lost: Callable[[], None],
    ) -> None:
        """Send a script, and call ``then`` with its answer.

        Where there will be no answer ``lost`` is called: the script has been run, or has not.
        """
        if self._hub is None and not self._under_way:
            self.poll()  # a connection that has ended since it was last used is left, as the loop would have done
        self._send(_Sent(script, keys, args, then, lost), "EVALSHA", script.sha)
        if self._hub is None:
            self.wait()
            self._take_parsed()

    def wait(self) -> None:
        """Take in the answers to all that was sent so far."""
        asked = set(self._under_way)
        try:
            while not asked.isdisjoint(self._under_way):
                self._take(self._next())
        finally:
            if self._hub is not None and self._parser is not None and self._parser.has_data():
                self._hub.call_soon(self._take_parsed)  # the loop sees only what is not received yet

    def readable(self) -> None:
        """The connection has something to say: take in what is there."""
        try:
            self._receive()
        except redis.ConnectionError:
            idle = not self._under_way
            self._leave()
            if not idle:
                raise
        self._take_parsed()

    def poll(self, seconds: float = 0.0) -> None:
        """Take in what is there, or comes within this time."""
        if self._more(seconds):
            self.readable()

    def doubt(self) -> None:
        """A script of this connection has changed keys: of those it is told no news."""
        self._tell(None)

    def freed(self) -> None:
        """A script of this connection has ended requests of tenants: they may have less in flight than their share."""
        for listener in self._listeners:
            listener.freed()

    def close(self) -> None:
        """Close the connection; what is under way is lost."""
        self._leave()

    def _send(self, sent: _Sent, command: str, what: str | bytes) -> None:
        said = (command, what, len(sent.keys), *sent.keys, *sent.args)
        if self._connection is not None and not self._under_way:
            try:
                self._connection.send_command(*said, check_health=False)
            except redis.ConnectionError:  # it has ended since it was last used: the broker has not got the script
                self._leave()
            else:
                self._under_way.append(sent)
                return
        self._under_way.append(sent)
        try:
            if self._connection is None:
                self._connect()
            self._connection.send_command(*said, check_health=False)
        except BaseException:
            self._leave()
            raise

    def _connect(self) -> None:
        pool = self._client.connection_pool
        connection = pool.connection_class(**{**pool.connection_kwargs, "protocol": 3})
        connection.connect()
        connection.send_command("CLIENT", "TRACKING", "ON", "NOLOOP")
        connection.read_response()
        self._connection, self._sock = connection, connection._sock
        self._parser = hiredis.Reader(replyError=connection._parser.parse_error, notEnoughData=_NOTHING)
        if self._hub is not None:
            self._hub.add_reader(self._sock, self.readable)

    def _more(self, seconds: float) -> bool:
        """Whether the broker has said something that is not taken in yet, or does so within this time."""
        if self._connection is None:
            return False
        if self._parser.has_data() or _buffered(self._sock):
            return True
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def _receive(self) -> None:
        """Wait until the broker says something, and give it to the parser."""
        try:
            while True:
                data = self._sock.recv(READ_BYTES)
                if not data:
                    raise redis.ConnectionError("the broker has closed the connection")
                self._parser.feed(data)
                if not _buffered(self._sock):
                    return
        except TimeoutError:
            raise redis.TimeoutError("the broker does not answer") from None
        except OSError as error:
            raise redis.ConnectionError(f"the connection to the broker has failed: {error}") from error

    def _next(self) -> Any:
        """The next thing that the broker says."""
        while (said := self._parser.gets()) is _NOTHING:
            try:
                self._receive()
            except redis.TimeoutError:
                # Connections that have been silent for longer will not answer either.
                self._client.connection_pool.disconnect(inuse_connections=False)
                self._leave()
                raise
            except BaseException:
                self._leave()
                raise
        return said

    def _take_parsed(self) -> None:
        """Take in what has come."""
        while self._connection is not None and (said := self._parser.gets()) is not _NOTHING:
            self._take(said)

    def _take(self, said: Any) -> None:
        """Do what follows upon an answer; pass on the news."""
        if isinstance(said, hiredis.PushNotification):
            if said[0] == b"invalidate":
                self._tell(said[1])
            return
        sent = self._under_way.popleft()
        if isinstance(said, NoScriptError):
            self._send(sent, "EVAL", sent.script.script)
        elif isinstance(said, ReadOnlyError):  # it is left for a broker that can write
            self._under_way.appendleft(sent)
            self._leave()
            raise said
        elif isinstance(said, ResponseError):
            sent.lost()
            raise said
        elif isinstance(said, Exception):
            self._under_way.appendleft(sent)
            self._leave()
            raise said
        else:
            sent.then(said)

    def _tell(self, names: Collection[bytes] | None) -> None:
        for listener in self._listeners:
            listener.changed(names)

    def _leave(self) -> None:
        """Close the connection; what is under way on it is lost."""
        connection, self._connection = self._connection, None
        if connection is not None:
            if self._hub is not None and self._sock.fileno() in self._hub.readers:
                self._hub.remove_reader(self._sock)
            self._sock = self._parser = None
            connection.disconnect()
            self._tell(None)
        while self._under_way:
            self._under_way.pop().lost()


def _buffered(sock: Any) -> bool:
    """Whether something of what a socket has received is not to be seen by polling it: TLS deciphers ahead."""
    return hasattr(sock, "pending") and sock.pending() > 0
