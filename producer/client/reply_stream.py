"""The stream on which a client's results come, read by one thread at a time."""

from __future__ import annotations

import logging
import time
from typing import Any

import redis

from shared.broker import connect
from shared.direct import DirectConnection
from shared.settings import FleetSettings

logger = logging.getLogger(__name__)

BLOCK_SECONDS = 1.0
READ_COUNT = 512
TRIM_ENTRIES = 2048
TRIM_BYTES = 4 * 1024 * 1024
"""What has been read is taken off the stream after this many entries or bytes, so that it stays small in the broker."""

WAKE_EXPIRES_SECONDS = 10

PAUSE_SECONDS = 0.5
"""How long reading rests after the broker has failed."""

Words = tuple[str | bytes | float, ...]


class Trouble:
    """Says that results cannot be read, once an outage."""

    def __init__(self) -> None:
        self._told = False

    def is_there(self, error: Exception) -> None:
        """Reading has failed."""
        if not self._told:
            logger.warning("cannot read results, trying again: %s", error)
        self._told = True

    def is_over(self) -> None:
        """It has not."""
        self._told = False


class Cursor:
    """How far a stream has been read, and what to ask the broker next. Pure."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._last: bytes = b"0"
        self._entries = self._bytes = 0

    @property
    def question(self) -> Words:
        """Asks for what comes next; answered when it comes, or after ``BLOCK_SECONDS``."""
        return (
            "XREAD", "COUNT", READ_COUNT, "BLOCK", int(1000 * BLOCK_SECONDS), "STREAMS", self.name, self._last,
        )  # fmt: skip

    def records_of(self, answer: Any) -> list[bytes]:
        """The records that came with an answer."""
        records = []
        entries = answer[0][1] if answer else []
        for entry_id, fields in entries:  # of each a list of names and values
            if fields[0] == b"m":
                records.append(fields[1])
            self._last = entry_id
            self._bytes += sum(map(len, fields))
        self._entries += len(entries)
        return records

    def trim(self) -> Words | None:
        """Takes what was read off the stream, where that is worth a command."""
        if self._entries < TRIM_ENTRIES and self._bytes < TRIM_BYTES:
            return None
        self._entries = self._bytes = 0
        return ("XTRIM", self.name, "MINID", self._last)


class ReplyStream:
    """Reads a stream to its end, and on. Whoever runs out of patience leaves the question to the next reader."""

    def __init__(self, fleet: FleetSettings, name: str) -> None:
        self._cursor = Cursor(name)
        self._most = BLOCK_SECONDS + fleet.socket_timeout_seconds
        self.client = connect(fleet, socket_timeout=self._most)
        self._waker = connect(fleet, socket_timeout=BLOCK_SECONDS)
        self._connection = DirectConnection(self.client)
        self._asked: float | None = None

    def read(self, patience: float) -> list[bytes]:
        """The records that have come; where there are none, those that come within ``patience`` seconds.

        Raises what the client library raises; then the next call connects anew.
        """
        try:
            asked = self._ask() if self._asked is None else self._asked
            answer: Any = self._connection.read(max(0.0, patience))
        except redis.TimeoutError:
            if self._asked is not None and time.monotonic() - asked <= self._most:
                return []
            self._drop()
            raise
        except BaseException:
            self._drop()
            raise
        self._asked = None
        records = self._cursor.records_of(answer)
        if (command := self._cursor.trim()) is not None:
            self.client.execute_command(*command)
        return records

    def _ask(self) -> float:
        self._connection.send(*self._cursor.question)
        self._asked = time.monotonic()
        return self._asked

    def wake(self) -> None:
        """An empty entry ends the read of whoever reads now, from another thread."""
        with self._waker.pipeline(transaction=True) as pipe:
            pipe.xadd(self._cursor.name, {b"wake": b""})
            pipe.expire(self._cursor.name, WAKE_EXPIRES_SECONDS)
            pipe.execute()

    def close(self) -> None:
        """Give the stream's memory back, and close the connections. Nobody reads any longer."""
        try:
            self.client.delete(self._cursor.name)
        finally:
            self._drop()
            self.client.close()
            self._waker.close()

    def _drop(self) -> None:
        self._asked = None
        self._connection.drop()
