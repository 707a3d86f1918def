"""Results come back on one stream per client, read by one thread; those that do not are looked up where they lie."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import islice
from typing import Any

import redis

from producer.client.records import POLL_SECONDS, Outcome, decode_record, outcome_of
from shared import keys
from shared.broker import connect
from shared.errors import FleetError
from shared.settings import FleetSettings

logger = logging.getLogger(__name__)

BLOCK_MS = 1000
READ_COUNT = 512
TRIM_ENTRIES = 2048
TRIM_BYTES = 4 * 1024 * 1024
"""What has been read is taken off the stream after this many entries or bytes, so that it stays small in the broker."""

WAKE_EXPIRES_SECONDS = 10

ELSEWHERE_SECONDS = 0.2
"""How often the results are looked up that go to another client's stream."""

LOOKED_UP = 1024
"""How many at once. All others are looked up each ``POLL_SECONDS``, the oldest first: their entries may be lost."""


class ReplyReader:
    """Resolves the futures of this client's requests. Safe to use from several threads."""

    def __init__(self, fleet: FleetSettings, client_id: str) -> None:
        self._fleet = fleet
        self.stream = keys.reply_stream(client_id)
        self._waiting: dict[str, Future[Outcome]] = {}
        self._elsewhere: dict[str, None] = {}
        self._everything_at = self._elsewhere_at = 0.0
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def expect(self, request_ids: list[str]) -> list[Future[Outcome]]:
        """One future a request; the same one for an id that is waited for already."""
        with self._lock:
            futures = []
            for request_id in request_ids:
                future = self._waiting.get(request_id)
                if future is None:
                    future = self._waiting[request_id] = Future()
                futures.append(future)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="muai-replies", daemon=True)
                self._thread.start()
        return futures

    def forget(self, request_ids: list[str]) -> None:
        """Stop waiting: these were never sent."""
        with self._lock:
            for request_id in request_ids:
                self._waiting.pop(request_id, None)
                self._elsewhere.pop(request_id, None)

    def watch(self, client: redis.Redis, request_ids: Sequence[str]) -> None:
        """Look these up now, and from time to time those that have no result yet: another client submitted them."""
        with self._lock:
            self._elsewhere.update((request_id, None) for request_id in request_ids if request_id in self._waiting)
        self._look_up(client, request_ids)

    def resolve_record(self, record: bytes | str) -> None:
        """Resolve the future of the request that a record tells of, where the record is a terminal one."""
        try:
            decoded = decode_record(record)
        except FleetError:
            logger.error("a record on the reply stream cannot be read; its request is looked up where it is stored")
            return
        if (outcome := outcome_of(decoded)) is not None:
            self.resolve(decoded["task_id"], outcome)

    def resolve(self, request_id: str, outcome: Outcome) -> None:
        """Resolve a request's future, where it is waited for."""
        with self._lock:
            future = self._waiting.pop(request_id, None)
            self._elsewhere.pop(request_id, None)
        if future is not None:
            future.set_result(outcome)

    def _resolve_stored(self, request_id: str, record: bytes | str) -> None:
        """Resolve a request's future with what is stored under its id, an error where that is no record."""
        try:
            outcome = outcome_of(decode_record(record))
        except FleetError as error:
            outcome = error
        if outcome is not None:
            self.resolve(request_id, outcome)

    def close(self) -> None:
        """Stop the thread and give the stream's memory back."""
        self._closed.set()
        thread = self._thread
        if thread is not None:
            self._wake()
            thread.join(timeout=BLOCK_MS / 1000 + self._fleet.socket_timeout_seconds)

    def _wake(self) -> None:
        """An empty entry ends the reader's blocking read at once; without it, closing would take up to that long."""
        client = connect(self._fleet, socket_timeout=BLOCK_MS / 1000)
        try:
            with client.pipeline(transaction=True) as pipe:
                pipe.xadd(self.stream, {b"wake": b""})
                pipe.expire(self.stream, WAKE_EXPIRES_SECONDS)
                pipe.execute()
        except (redis.RedisError, OSError) as error:
            logger.info("closing waits for the reader: %s", error)
        finally:
            client.close()

    def _due(self) -> list[str]:
        """The requests whose results are to be looked up now."""
        now = time.monotonic()
        with self._lock:
            if now >= self._everything_at:
                self._everything_at = now + POLL_SECONDS
                return list(islice(self._waiting, LOOKED_UP))
            if self._elsewhere and now >= self._elsewhere_at:
                self._elsewhere_at = now + ELSEWHERE_SECONDS
                return list(islice(self._elsewhere, LOOKED_UP))
        return []

    def _look_up(self, client: redis.Redis, request_ids: Sequence[str]) -> None:
        for start in range(0, len(request_ids), LOOKED_UP):
            piece = request_ids[start : start + LOOKED_UP]
            records: Any = client.mget([keys.result_key(request_id) for request_id in piece])
            for request_id, record in zip(piece, records, strict=True):
                if record is not None:
                    self._resolve_stored(request_id, record)

    def _run(self) -> None:
        client = connect(self._fleet, socket_timeout=BLOCK_MS / 1000 + self._fleet.socket_timeout_seconds)
        last = b"0"
        entries_read = bytes_read = 0
        failing = False
        while not self._closed.is_set():
            try:
                self._look_up(client, self._due())
                block = int(1000 * ELSEWHERE_SECONDS) if self._elsewhere else BLOCK_MS
                replies: Any = client.xread({self.stream: last}, count=READ_COUNT, block=block)
                failing = False
                if not replies:
                    continue
                entries = replies[0][1]
                for entry_id, fields in entries:
                    if b"m" in fields:
                        self.resolve_record(fields[b"m"])
                    last = entry_id
                    bytes_read += sum(map(len, fields.values()))
                entries_read += len(entries)
                if entries_read >= TRIM_ENTRIES or bytes_read >= TRIM_BYTES:
                    client.xtrim(self.stream, minid=last, approximate=False)
                    entries_read = bytes_read = 0
            except (redis.RedisError, OSError) as error:
                if not failing:  # once an outage
                    logger.warning("cannot read results, trying again: %s", error)
                failing = True
                self._closed.wait(0.5)
        try:
            client.delete(self.stream)
        except (redis.RedisError, OSError) as error:
            logger.info("the reply stream stays until it expires: %s", error)
        client.close()
