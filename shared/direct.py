"""Commands to the broker without what a pool of connections does around each: for the path of a request."""

from __future__ import annotations

import hashlib
import select
from collections.abc import Sequence
from typing import Any

import redis


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


class DirectScript:
    """A script that is run again and again. Safe to use from several threads."""

    def __init__(self, client: redis.Redis, text: str) -> None:
        self._client = client
        self._text = text
        self._sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        self._free: list[DirectConnection] = []

    def __call__(self, keys: Sequence[str], args: Sequence[str | bytes | float]) -> Any:
        """Run it. Raises what the client library raises."""
        try:
            connection = self._free.pop()
        except IndexError:
            connection = DirectConnection(self._client)
        try:
            connection.send("EVALSHA", self._sha, len(keys), *keys, *args)
            try:
                answer = connection.read()
            except redis.exceptions.NoScriptError:
                connection.send("EVAL", self._text, len(keys), *keys, *args)
                answer = connection.read()
        except redis.ResponseError as error:
            if isinstance(error, redis.ReadOnlyError):
                connection.drop()
            raise
        except BaseException:
            connection.drop()
            raise
        finally:
            self._free.append(connection)
        return answer
