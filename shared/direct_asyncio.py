"""Commands to the broker from an event loop: all of its tasks share one connection."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any

import redis
import redis.asyncio

Words = Sequence[str | bytes | float]


class SharedConnection:
    """One connection for all tasks of an event loop. It is made when it is needed, and anew where it was lost.

    Commands are sent one behind the other, and their answers taken in as they come: a task that is cancelled takes
    nobody along. What is not answered within ``patience`` seconds fails, and with it what was sent behind it.
    """

    def __init__(self, client: redis.asyncio.Redis, patience: float) -> None:
        self._client = client
        self._patience = patience
        self._link: _Link | None = None
        self._linking: asyncio.Task[_Link] | None = None

    async def command(self, *words: str | bytes | float) -> Any:
        """Send a command and return its answer. Raises what the client library raises."""
        link = self._link
        if link is None or link.lost:
            link = await self._linked()
        return await link.ask(words)

    async def close(self) -> None:
        """Close the connection; who waits for an answer has :class:`redis.ConnectionError`."""
        if self._linking is not None:
            self._linking.cancel()
        if self._link is not None:
            self._link.lose(redis.ConnectionError("the connection was closed"))

    async def _linked(self) -> _Link:
        """A new connection; those who need one meanwhile wait for the same."""
        if self._linking is None:
            self._linking = asyncio.create_task(self._connect())
        linking = self._linking
        try:
            return await asyncio.shield(linking)
        finally:
            if linking.done() and self._linking is linking:
                self._linking = None

    async def _connect(self) -> _Link:
        connection: Any = self._client.connection_pool.make_connection()
        try:
            async with asyncio.timeout(self._patience):
                await connection.connect_check_health(check_health=False)
        except TimeoutError as error:
            raise _unsent(redis.TimeoutError("no answer while connecting")) from error
        except (redis.RedisError, OSError) as error:
            raise _unsent(error) from None
        self._link = _Link(connection, self._patience)
        return self._link


class _Link:
    """A connection that is made, and what it owes an answer to."""

    def __init__(self, connection: Any, patience: float) -> None:
        self._connection = connection
        self._patience = patience
        self._owed: deque[tuple[float, asyncio.Future[Any]]] = deque()
        self._reading: asyncio.Task[None] | None = None
        self._broken = False

    @property
    def lost(self) -> bool:
        """Whether it is of no use any more."""
        return self._broken or self._connection._reader.at_eof()

    async def ask(self, words: Words) -> Any:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()
        writer = self._connection._writer
        writer.writelines(self._connection.pack_command(*words))
        self._owed.append((loop.time(), answer))
        if self._reading is None:
            self._reading = loop.create_task(self._take_in())
        try:
            await writer.drain()
        except OSError as error:
            self.lose(redis.ConnectionError(str(error)))
        return await answer

    async def _take_in(self) -> None:
        """Hand out the answers that are owed."""
        try:
            while self._owed:
                asked, answer = self._owed[0]
                value: Any
                error: Exception | None = None
                try:
                    async with asyncio.timeout_at(asked + self._patience):
                        value = await self._connection.read_response(disconnect_on_error=False)
                except redis.ResponseError as refused:
                    value, error = None, refused
                self._owed.popleft()
                if not answer.done():  # else its task was cancelled
                    answer.set_exception(error) if error is not None else answer.set_result(value)
                if isinstance(error, redis.ReadOnlyError):
                    raise redis.ConnectionError("the broker has become a replica")
        except TimeoutError:
            self.lose(redis.TimeoutError("no answer"))
        except (redis.RedisError, OSError) as error:
            self.lose(error)
        finally:
            self._reading = None

    def lose(self, error: Exception) -> None:
        """Give the connection up; whatever it still owes fails."""
        self._broken = True
        owed, self._owed = self._owed, deque()
        for _, answer in owed:
            if not answer.done():
                answer.set_exception(error)
        if self._reading is not None and self._reading is not asyncio.current_task():
            self._reading.cancel()
        if self._connection._writer is not None:
            self._connection._writer.close()


def _unsent(error: Exception) -> Exception:
    error.unsent = True  # type: ignore[attr-defined]
    return error
