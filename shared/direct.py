"""Commands to the broker without what a pool of connections does around each: for the path of a request."""

from __future__ import annotations

import hashlib
import select
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import redis


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script, and the name that the broker knows it by."""

    text: str
    sha: str

    @classmethod
    def of(cls, text: str) -> Script:
        """The script of this text."""
        return cls(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())

    def by_name(self, keys: Sequence[str], args: Sequence[str | bytes | float]) -> tuple[str | bytes | float, ...]:
        """The command that runs it where the broker knows it."""
        return ("EVALSHA", self.sha, len(keys), *keys, *args)

    def in_full(self, keys: Sequence[str], args: Sequence[str | bytes | float]) -> tuple[str | bytes | float, ...]:
        """The command that runs it where it does not."""
        return ("EVAL", self.text, len(keys), *keys, *args)


class DirectConnection:
    """One connection, for one thread at a time. It is made when it is needed, and anew where it was closed."""

    def __init__(self, client: redis.Redis) -> None:
        pool = client.connection_pool
        self._connection: Any = pool.connection_class(**pool.connection_kwargs)
        self._poll: select.poll | None = None

    def send(self, *words: str | bytes | float) -> None:
        """Send a command. Raises what the client library raises."""
        if self._poll is not None and self._poll.poll(0):
            self.drop()  # the broker has closed it
        if self._poll is None:
            self._connection.connect_check_health(check_health=False)
            self._poll = select.poll()
            self._poll.register(self._connection._sock, select.POLLIN)
        self._connection.send_command(*words, check_health=False)

    def read(self, timeout: float | None = None) -> Any:
        """The answer to a command. Where none comes within ``timeout`` seconds it can be read later.

        Raises :class:`redis.TimeoutError` and what else the client library raises.
        """
        if timeout is None:
            return self._connection.read_response()
        return self._connection.read_response(timeout=timeout, disconnect_on_error=False)

    def drop(self) -> None:
        """Close the connection."""
        self._poll = None
        self._connection.disconnect()


class DirectConnections:
    """As many connections as threads send at once. Safe to use from several threads."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._free: list[DirectConnection] = []

    def command(self, *words: str | bytes | float) -> Any:
        """Send a command and return its answer. Raises what the client library raises."""
        try:
            connection = self._free.pop()
        except IndexError:
            connection = DirectConnection(self._client)
        try:
            connection.send(*words)
            return connection.read()
        except redis.ResponseError as error:
            if isinstance(error, redis.ReadOnlyError):
                connection.drop()
            raise
        except BaseException:
            connection.drop()
            raise
        finally:
            self._free.append(connection)

    def close(self) -> None:
        """Close those that are not in use."""
        while self._free:
            self._free.pop().drop()
