"""Results come back on one stream per client; those that do not are looked up where they lie.

Whoever waits for a result reads the stream, one thread at a time for all: an answer wakes the thread that wants it, and
no other on the way. The client's own thread reads where nobody waits: for those who are called back, and after a while.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import islice
from typing import Any

import redis

from producer.client.records import POLL_SECONDS, Outcome, decode_record, outcome_of
from producer.client.reply_stream import BLOCK_SECONDS, ReplyStream
from producer.client.turns import Turns
from shared import keys
from shared.errors import FleetError
from shared.settings import FleetSettings

logger = logging.getLogger(__name__)

ELSEWHERE_SECONDS = 0.2
"""How often the results are looked up that go to another client's stream."""

LOOKED_UP = 1024
"""How many at once. All others are looked up each ``POLL_SECONDS``, the oldest first: their entries may be lost."""

ALONE_SECONDS = 0.1
"""How long results are left to those who may come to wait for them, before the client's own thread reads them."""

IN_USE_SECONDS = 2.0
"""How long the client's own thread looks around for work after it was last needed."""

PAUSE_SECONDS = 0.5
"""How long reading rests after the broker has failed."""


class Reply(Future[Outcome]):
    """A future result. Whoever waits for it reads it; who asks to be called back has it read."""

    def __init__(self, replies: ReplyReader) -> None:
        super().__init__()
        self._replies = replies

    def result(self, timeout: float | None = None) -> Outcome:
        """Wait for the result; raises :class:`TimeoutError`."""
        return super().result(self._replies.wait(self, timeout))

    def add_done_callback(self, fn: Callable[[Future[Outcome]], object]) -> None:
        """Call ``fn`` with this future when the result is there."""
        super().add_done_callback(fn)
        self._replies.read_for(self)

    def when_done(self, fn: Callable[[], object]) -> None:
        """Call ``fn`` when somebody has read the result."""
        super().add_done_callback(lambda _: fn())


class ReplyReader:
    """Resolves the futures of this client's requests. Safe to use from several threads."""

    def __init__(self, fleet: FleetSettings, client_id: str) -> None:
        self._fleet = fleet
        self.stream = keys.reply_stream(client_id)
        self._entries = ReplyStream(fleet, self.stream)
        self._turns = Turns()
        self._waiting: dict[str, Reply] = {}
        self._called_back: set[Reply] = set()
        self._elsewhere: dict[str, None] = {}
        self._everything_at = self._elsewhere_at = 0.0
        self._failing = False
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._stir = threading.Event()
        self._parked = False
        self._used = 0.0

    def expect(self, request_ids: list[str]) -> list[Future[Outcome]]:
        """One future a request; the same one for an id that is waited for already."""
        futures: list[Future[Outcome]] = []
        with self._lock:
            if not self._waiting:
                self._used = time.monotonic()
            for request_id in request_ids:
                future = self._waiting.get(request_id)
                if future is None:
                    future = self._waiting[request_id] = Reply(self)
                futures.append(future)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="muai-replies", daemon=True)
                self._thread.start()
            if self._parked:
                self._stir.set()
        return futures

    def forget(self, request_ids: list[str]) -> None:
        """Stop waiting: these were never sent."""
        with self._lock:
            for request_id in request_ids:
                self._drop(request_id)

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
            future = self._drop(request_id)
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

    def _drop(self, request_id: str) -> Reply | None:
        """No longer wait for it; the lock is held."""
        reply = self._waiting.pop(request_id, None)
        self._elsewhere.pop(request_id, None)
        if reply is not None:
            self._called_back.discard(reply)
        return reply

    # -- who reads --------------------------------------------------------------------------------------------------

    def wait(self, reply: Reply, timeout: float | None) -> float | None:
        """Wait until it is resolved, reading for all where nobody else does; returns what is left of ``timeout``."""
        end = None if timeout is None else time.monotonic() + timeout
        while not (reply.done() or self._closed.is_set()):
            turn = self._turns.take_or_queue()
            if turn is None:
                try:
                    self._read_until(reply, end)
                finally:
                    self._turns.give_up()
            else:
                reply.when_done(turn.set)
                turn.wait(_left(end))
                self._turns.leave(turn)
            if _left(end) == 0:
                break
        return _left(end)

    def _read_until(self, reply: Reply, end: float | None) -> None:
        while True:
            left = _left(end)
            self._read(BLOCK_SECONDS if left is None else min(BLOCK_SECONDS, left))
            if reply.done() or self._closed.is_set() or _left(end) == 0:
                return

    def _read(self, patience: float) -> None:
        """Resolve what has come, or what comes within ``patience`` seconds."""
        try:
            self._look_up(self._entries.client, self._due())
            records = self._entries.read(min(patience, ELSEWHERE_SECONDS) if self._elsewhere else patience)
        except (redis.RedisError, OSError) as error:
            if not self._failing:  # once an outage
                logger.warning("cannot read results, trying again: %s", error)
            self._failing = True
            self._closed.wait(min(PAUSE_SECONDS, patience))
            return
        self._failing = False
        if records:
            self._used = time.monotonic()
        for record in records:
            self.resolve_record(record)

    def read_for(self, reply: Reply) -> None:
        """Somebody is to be called back: let the client's own thread read."""
        with self._lock:
            if not reply.done():
                self._called_back.add(reply)
                self._stir.set()

    def _run(self) -> None:
        """Read for those who do not wait."""
        while not self._closed.is_set():
            offered = True
            if self._is_left_alone() and self._turns.take():
                try:
                    self._read(BLOCK_SECONDS)
                finally:
                    offered = self._turns.give_up()
            if offered:
                self._rest()

    def _is_left_alone(self) -> bool:
        """Whether there are results that nobody comes to wait for."""
        if self._called_back:
            return True
        return bool(self._waiting) and time.monotonic() - self._used > ALONE_SECONDS

    def _rest(self) -> None:
        """Until there may be something to do: for a moment, or, where the client is not in use, until it is."""
        with self._lock:
            if self._called_back and not self._turns.taken:
                return
            self._parked = not self._waiting and time.monotonic() - self._used > IN_USE_SECONDS
            self._stir.clear()
        self._stir.wait(None if self._parked else ALONE_SECONDS)

    def close(self) -> None:
        """Stop reading, and give the stream's memory back."""
        self._closed.set()
        self._stir.set()
        if self._thread is None:
            return
        limit = BLOCK_SECONDS + self._fleet.socket_timeout_seconds
        turn = self._turns.take_or_queue()
        if turn is not None:
            try:
                self._entries.wake()
            except (redis.RedisError, OSError) as error:
                logger.info("closing waits for the reader: %s", error)
            turn.wait(limit)
        self._thread.join(timeout=limit)
        try:
            self._entries.close()
        except (redis.RedisError, OSError) as error:
            logger.info("the reply stream stays until it expires: %s", error)

    # -- looking up -------------------------------------------------------------------------------------------------

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


def _left(end: float | None) -> float | None:
    """Seconds until ``end``; ``None`` where there is none."""
    return None if end is None else max(0.0, end - time.monotonic())
