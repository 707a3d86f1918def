"""Pipelining: scripts are sent to the broker one behind the other, and the loop goes on with its work meanwhile.

The answers come in the order of the questions, and are taken in when the loop finds them on the connection. Without a
loop each script is waited for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import redis
from kombu.asynchronous import Hub
from redis.commands.core import Script
from redis.exceptions import NoScriptError, ResponseError

PATIENCE_SECONDS = 0.5
"""How long a connection may say nothing to what was asked before another was made."""


@dataclass(frozen=True, slots=True, eq=False)
class _Sent:
    """A script whose answer is on its way, and what follows."""

    script: Script
    keys: Sequence[str]
    args: Sequence[Any]
    then: Callable[[Any], None]
    lost: Callable[[], None]


class PipelinedScripts:
    """One connection with several scripts under way. For the thread of the loop only.

    What the broker or the connection raises is raised where the answer is taken in: by :meth:`run` and :meth:`wait`, or
    into the loop.
    """

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._connection: Any = None
        self._hub: Hub | None = None
        self._reader = -1
        self._under_way: deque[_Sent] = deque()

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
            hub.add_reader(self._reader, self._readable)

    def detach(self) -> None:
        """The loop is over: take in what is under way, and wait for each script from now on."""
        if self._connection is not None:
            limit = self._client.connection_pool.connection_kwargs["socket_timeout"]  # it may have changed
            self._connection._sock.settimeout(limit)
        try:
            while self._under_way:
                self._read_answer()
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
        sent = _Sent(script, keys, args, then, lost)
        if self._hub is not None:
            self._send(sent, "EVALSHA", script.sha)
            return
        try:
            answer = script(keys=keys, args=args)
        except BaseException:
            lost()
            raise
        then(answer)

    def wait(self) -> None:
        """Take in the answers to all that was sent so far."""
        asked = set(self._under_way)
        while not asked.isdisjoint(self._under_way):
            self._read_answer()

    def _send(self, sent: _Sent, command: str, what: str | bytes) -> None:
        self._under_way.append(sent)
        try:
            if self._connection is None:
                self._connect()
            self._connection.send_command(command, what, len(sent.keys), *sent.keys, *sent.args)
        except BaseException:
            self._leave()
            raise

    def _connect(self) -> None:
        pool = self._client.connection_pool
        self._connection = pool.connection_class(**pool.connection_kwargs)
        self._connection.connect()
        self._reader = self._connection._sock.fileno()
        if self._hub is not None:
            self._hub.add_reader(self._reader, self._readable)

    def _readable(self) -> None:
        if not self._under_way:  # nothing was asked: the broker has closed the connection
            with suppress(redis.ConnectionError):
                if self._more():
                    self._leave()
        while self._under_way:
            self._read_answer()
            if not self._under_way or not self._more():
                break

    def _more(self, seconds: float = 0.0) -> bool:
        """Whether the broker has said something that is not taken in yet, or does so within this time."""
        try:
            return self._connection is not None and self._connection.can_read(seconds)
        except BaseException:
            self._leave()
            raise

    def _read_answer(self) -> None:
        """Wait for the next answer, and do what follows upon it."""
        try:
            answer = self._connection.read_response()
        except NoScriptError:
            sent = self._under_way.popleft()
            self._send(sent, "EVAL", sent.script.script)
            return
        except ResponseError:
            self._under_way.popleft().lost()
            if self._connection._sock is None:  # it is left for a broker that can write
                self._leave()
            raise
        except redis.TimeoutError:
            # Connections that have been silent for longer will not answer either.
            self._client.connection_pool.disconnect(inuse_connections=False)
            self._leave()
            raise
        except BaseException:
            self._leave()
            raise
        self._under_way.popleft().then(answer)

    def _leave(self) -> None:
        """Close the connection; what is under way on it is lost."""
        connection, self._connection = self._connection, None
        if connection is not None:
            if self._hub is not None and self._reader in self._hub.readers:
                self._hub.remove_reader(self._reader)
            connection.disconnect()
        while self._under_way:
            self._under_way.pop().lost()
