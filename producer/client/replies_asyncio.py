"""The same results, read by tasks of an event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import redis

from producer.client.awaited import ELSEWHERE_SECONDS, Awaited, look_up
from producer.client.awaiting import Awaiting
from producer.client.records import Outcome
from producer.client.reply_stream import BLOCK_SECONDS, PAUSE_SECONDS, Cursor, Trouble
from producer.client.submitted import Submitted
from shared import keys
from shared.broker import connect_asyncio
from shared.direct_asyncio import SharedConnection
from shared.settings import FleetSettings

logger = logging.getLogger(__name__)


class LoopReply(asyncio.Future[Outcome]):
    """A future result, and the table that resolves it."""

    table: Awaited[LoopReply]


class LoopReplyReader:
    """Resolves the futures of this client's requests, in the event loop in which it was made.

    One task reads the stream, another looks up what does not come on it. Both rest while nobody waits.
    """

    def __init__(self, fleet: FleetSettings, client_id: str, lookups: Awaiting) -> None:
        self._loop = asyncio.get_running_loop()
        self.awaited = Awaited(self._new)
        self.stream = keys.reply_stream(client_id)
        self._cursor = Cursor(self.stream)
        self._connection = SharedConnection(connect_asyncio(fleet), BLOCK_SECONDS + fleet.socket_timeout_seconds)
        self._lookups = lookups
        self._wanted = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._trouble = Trouble()

    def _new(self) -> LoopReply:
        reply = LoopReply(loop=self._loop)
        reply.table = self.awaited
        return reply

    def expect(self, request_ids: Sequence[str]) -> list[LoopReply]:
        """A new future for each request."""
        self._stirred()
        return self.awaited.expect(request_ids)

    def add(self, submitted: Sequence[Submitted]) -> None:
        """Tell these their outcomes, too."""
        self._stirred()
        self.awaited.add(submitted)

    def _stirred(self) -> None:
        """Results are about to be waited for."""
        self._wanted.set()
        if not self._tasks:
            self._tasks = [self._loop.create_task(self._read()), self._loop.create_task(self._look_up())]

    async def _read(self) -> None:
        """Resolve what comes on the stream."""
        while True:
            await self._wanted.wait()
            try:
                answer = await self._connection.command(*self._cursor.question)
                for record in self._cursor.records_of(answer):
                    self.awaited.resolve_record(record)
                if (trim := self._cursor.trim()) is not None:
                    await self._connection.command(*trim)
                self._trouble.is_over()
            except (redis.RedisError, OSError) as error:
                self._trouble.is_there(error)
                await asyncio.sleep(PAUSE_SECONDS)
            if not len(self.awaited):
                self._wanted.clear()

    async def _look_up(self) -> None:
        """Resolve what was stored, and does not come on the stream."""
        while True:
            await self._wanted.wait()
            try:
                await self._lookups.run(look_up(self.awaited, self.awaited.due()))
            except (redis.RedisError, OSError) as error:
                logger.debug("cannot look results up, trying again: %s", error)
            await asyncio.sleep(ELSEWHERE_SECONDS)

    async def close(self) -> None:
        """Stop reading, tell those who wait that the client is closed, and give the stream's memory back."""
        self.awaited.end()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._connection.close()  # a read of it may still be under way
        if not self._tasks:
            return
        try:
            await self._connection.command("DEL", self.stream)
        except (redis.RedisError, OSError) as error:
            logger.info("the reply stream stays until it expires: %s", error)
        await self._connection.close()
