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

import redis

from producer.client.awaited import ELSEWHERE_SECONDS, Awaited, look_up
from producer.client.blocking import Blocking
from producer.client.records import Outcome
from producer.client.reply_stream import BLOCK_SECONDS, PAUSE_SECONDS, ReplyStream, Trouble
from producer.client.submitted import Submitted
from producer.client.turns import Turns
from shared import keys
from shared.settings import FleetSettings

logger = logging.getLogger(__name__)

ALONE_SECONDS = 0.1
"""How long results are left to those who may come to wait for them, before the client's own thread reads them."""

IN_USE_SECONDS = 2.0
"""How long the client's own thread looks around for work after it was last needed."""


class Reply(Future[Outcome]):
    """A future result. Whoever waits for it reads it; who asks to be called back has it read."""

    def __init__(self, replies: ReplyReader) -> None:
        super().__init__()
        self._replies = replies
        self.table = replies.awaited

    def result(self, timeout: float | None = None) -> Outcome:
        """Wait for the result; raises :class:`TimeoutError`."""
        return super().result(self._replies.wait(self, timeout))

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for what is raised in place of a result: :class:`~shared.errors.ClientClosed`, or nothing."""
        return super().exception(self._replies.wait(self, timeout))

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
        self.awaited = Awaited(lambda: Reply(self))
        self._entries = ReplyStream(fleet, self.stream)
        self._broker = Blocking(self._entries.client)
        self._turns = Turns()
        self._trouble = Trouble()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._stir = threading.Event()
        self._parked = False
        self._used = 0.0

    def expect(self, request_ids: Sequence[str]) -> list[Reply]:
        """A new future for each request."""
        with self._lock:
            self._stirred()
            return self.awaited.expect(request_ids)

    def add(self, submitted: Sequence[Submitted]) -> None:
        """Tell these their outcomes, too."""
        with self._lock:
            self._stirred()
            self.awaited.add(submitted)

    def _stirred(self) -> None:
        """Results are about to be waited for; the lock is held."""
        if not len(self.awaited):
            self._used = time.monotonic()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="muai-replies", daemon=True)
            self._thread.start()
        if self._parked:
            self._stir.set()

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
            self._broker.run(look_up(self.awaited, self.awaited.due()))
            records = self._entries.read(min(patience, ELSEWHERE_SECONDS) if self.awaited.elsewhere else patience)
        except (redis.RedisError, OSError) as error:
            self._trouble.is_there(error)
            self._closed.wait(min(PAUSE_SECONDS, patience))
            return
        self._trouble.is_over()
        if records:
            self._used = time.monotonic()
        for record in records:
            self.awaited.resolve_record(record)

    def read_for(self, reply: Reply) -> None:
        """Somebody is to be called back: let the client's own thread read."""
        with self._lock:
            if reply.done():
                return
            self.awaited.hold(reply)
            self._stir.set()
        Future.add_done_callback(reply, self._release)

    def _release(self, reply: Future[Outcome]) -> None:
        if isinstance(reply, Reply):
            self.awaited.release(reply)

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
        if self.awaited.holds:
            return True
        return len(self.awaited) > 0 and time.monotonic() - self._used > ALONE_SECONDS

    def _rest(self) -> None:
        """Until there may be something to do: for a moment, or, where the client is not in use, until it is."""
        with self._lock:
            if self.awaited.holds and not self._turns.taken:
                return
            self._parked = not len(self.awaited) and time.monotonic() - self._used > IN_USE_SECONDS
            self._stir.clear()
        self._stir.wait(None if self._parked else ALONE_SECONDS)

    def close(self) -> None:
        """Stop reading, tell those who wait that the client is closed, and give the stream's memory back."""
        self._closed.set()
        self._stir.set()
        self.awaited.end()
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
            self._broker.close()
            self._entries.close()
        except (redis.RedisError, OSError) as error:
            logger.info("the reply stream stays until it expires: %s", error)


def _left(end: float | None) -> float | None:
    """Seconds until ``end``; ``None`` where there is none."""
    return None if end is None else max(0.0, end - time.monotonic())
