"""The spool: requests that were submitted while the broker was away, kept on disk until it has them."""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from producer.client.records import Outcome
from shared.contract import InferenceRequest
from shared.errors import (
    BadRequest,
    BrokerRefused,
    BrokerUnavailable,
    ConfigurationError,
    DeadlineExceeded,
    FleetError,
    SpoolFull,
)

logger = logging.getLogger(__name__)

AT_ONCE = 64
PAUSE_FIRST, PAUSE_LONGEST = 0.25, 2.0
"""Seconds between two tries to deliver."""

LOCK_SECONDS = 10.0
"""How long one process waits for another one's transaction."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS spool (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    time REAL NOT NULL,
    request BLOB NOT NULL
)
"""


@dataclass(frozen=True, slots=True)
class Spooled:
    """One request in the spool, in the order of ``number``; ``time`` is in seconds since the epoch."""

    number: int
    id: str
    time: float
    payload: bytes

    def summary(self) -> dict[str, Any]:
        """What may be shown of it without its inputs."""
        shown = {"id": self.id, "time": self.time, "bytes": len(self.payload)}
        try:
            request = self.request()
        except BadRequest as error:
            return {**shown, "error": error.message}
        return {**shown, "model": request.model, "kind": request.kind, "deadline": request.deadline}

    def request(self) -> InferenceRequest:
        """The request; raise :class:`BadRequest` where it is not a valid one."""
        try:
            return InferenceRequest.parse(orjson.loads(self.payload))
        except orjson.JSONDecodeError as error:
            raise BadRequest(f"the spooled request is not JSON: {error}") from None


class Spool:
    """A file of requests, the oldest first. Safe to use from several threads, and from several processes at once.

    What :meth:`add` has taken survives the end of the process and of the machine. Raises :class:`ConfigurationError`
    where ``path`` cannot be used.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)  # it holds inputs
            self._file = sqlite3.connect(path, timeout=LOCK_SECONDS, isolation_level=None, check_same_thread=False)
            self._file.execute("PRAGMA journal_mode=WAL")
            self._file.execute("PRAGMA synchronous=FULL")
            self._file.execute(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise ConfigurationError(f"fleet.spool_path: {path} cannot be used as a spool: {error}") from error

    def add(self, requests: Sequence[InferenceRequest]) -> None:
        """Keep all of them or, where they do not fit or the disk fails, none: then :class:`SpoolFull` is raised.

        A request whose id is there already is there once.
        """
        now = time.time()
        rows = []
        for request in requests:
            fields = request.model_dump(mode="json", exclude_defaults=True) | {"id": request.id}
            rows.append((request.id, now, orjson.dumps(fields)))
        away = f"cannot submit: the broker is away, and {self.path}"
        try:
            with self._transaction() as file:
                file.executemany("INSERT OR IGNORE INTO spool (id, time, request) VALUES (?, ?, ?)", rows)
                (used,) = file.execute("SELECT coalesce(sum(length(request)), 0) FROM spool").fetchone()
                if used > self._max_bytes:
                    raise SpoolFull(f"{away} is full (fleet.spool_max_bytes is {self._max_bytes})")
        except sqlite3.Error as error:
            raise SpoolFull(f"{away} cannot be written: {error}") from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._file.execute("BEGIN IMMEDIATE")
            try:
                yield self._file
                self._file.execute("COMMIT")
            except BaseException:
                if self._file.in_transaction:
                    self._file.execute("ROLLBACK")
                raise

    def oldest(self, limit: int, after: int = 0) -> list[Spooled]:
        """The first of those that come after number ``after``."""
        with self._lock:
            rows = self._file.execute(
                "SELECT number, id, time, request FROM spool WHERE number > ? ORDER BY number LIMIT ?", (after, limit)
            ).fetchall()
        return [Spooled(*row) for row in rows]

    def remove(self, spooled: Sequence[Spooled]) -> int:
        """Forget them; returns how many were there."""
        with self._transaction() as file:
            numbers = [(entry.number,) for entry in spooled]
            return max(0, file.executemany("DELETE FROM spool WHERE number = ?", numbers).rowcount)

    def __iter__(self) -> Iterator[Spooled]:
        """All of them, read as they are wanted."""
        after = 0
        while batch := self.oldest(AT_ONCE, after):
            yield from batch
            after = batch[-1].number

    def __len__(self) -> int:
        with self._lock:
            return int(self._file.execute("SELECT count(*) FROM spool").fetchone()[0])

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._file.close()


Send = Callable[[Sequence[InferenceRequest]], object]
Answer = Callable[[str, Outcome], None]


class SpoolSender:
    """Delivers what is in a spool, the oldest first, from a thread of its own.

    While the broker is away new requests go behind what is there. ``send`` submits requests, each id
    once however often it is called; ``answer`` is told of those that cannot be submitted at all.
    """

    def __init__(self, spool: Spool, send: Send, answer: Answer | None = None) -> None:
        self._spool = spool
        self._send = send
        self._answer = answer
        self._lock = threading.Lock()
        self._behind = len(spool) > 0
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Deliver what is there already."""
        if self._behind:
            self._start()

    def submit(self, requests: Sequence[InferenceRequest]) -> None:
        """Submit, or spool where the broker is away."""
        with self._lock:
            if self._behind:
                self._keep(requests)
                return
        try:
            self._send(requests)
        except BrokerRefused:
            raise
        except BrokerUnavailable as error:
            with self._lock:
                self._keep(requests)
            logger.warning("requests are spooled to %s: %s", self._spool.path, error)

    def _keep(self, requests: Sequence[InferenceRequest]) -> None:
        self._spool.add(requests)
        self._behind = True
        self._start()
        self._wake.set()

    def deliver(self) -> int:
        """Submit all that is there; returns how many went. Raises :class:`BrokerUnavailable` where the broker is away.

        What no live worker can serve stays in the spool, and so does what the fleet takes no more of now.
        """
        sent, after = 0, 0
        while batch := self._spool.oldest(AT_ONCE, after):
            after = batch[-1].number
            try:
                self._send([entry.request() for entry in batch])
                done = len(batch)
                self._spool.remove(batch)
            except BrokerUnavailable:
                raise
            except FleetError:  # of one of them: by themselves they say which
                done = sum(map(self._deliver_one, batch))
            sent += done
        return sent

    def _deliver_one(self, entry: Spooled) -> bool:
        try:
            request = entry.request()
            if request.expired():
                raise DeadlineExceeded("the request's deadline passed while the broker was away")
            self._send([request])
        except (BadRequest, DeadlineExceeded) as error:
            logger.warning("request %s leaves the spool: %s", entry.id, error)
            if self._answer is not None:
                self._answer(entry.id, error)
        except BrokerUnavailable:
            raise
        except FleetError as error:
            logger.info("request %s stays in the spool: %s", entry.id, error)
            return False
        self._spool.remove([entry])
        return True

    def close(self) -> None:
        """Stop the thread. What was not delivered stays for the next one."""
        with self._lock:
            self._closed.set()
            self._wake.set()
        if self._thread is not None:
            self._thread.join()
        self._spool.close()

    def _start(self) -> None:
        if self._thread is None:
            self._wake.set()
            self._thread = threading.Thread(target=self._run, name="muai-spool", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        pause = PAUSE_FIRST
        while self._wake.wait() and not self._closed.is_set():
            away = False
            try:
                if sent := self.deliver():
                    logger.warning("%d spooled requests were delivered", sent)
                    pause = PAUSE_FIRST
                    continue  # there may be more by now
            except (FleetError, sqlite3.Error) as error:
                logger.info("the spool is not delivered yet: %s", error)
                away = True
            with self._lock:
                left = len(self._spool) > 0
                self._behind = left and away  # what nobody serves holds nobody up
                if not left and not self._closed.is_set():
                    self._wake.clear()
                    continue
            self._closed.wait(pause)
            pause = min(2 * pause, PAUSE_LONGEST)
