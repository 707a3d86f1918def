"""The spool: requests that were submitted while the broker was away, kept in a file until the broker has them."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from producer.client.submission import Submission
from shared.contract import InferenceRequest
from shared.errors import BadRequest, ConfigurationError, SpoolFull

AT_ONCE = 64
"""Requests that are read from the file together."""

LOCK_SECONDS = 10.0
"""How long one process waits for another one's transaction."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS spool (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    time REAL NOT NULL,
    request BLOB NOT NULL,
    headers BLOB
)
"""


@dataclass(frozen=True, slots=True)
class Spooled:
    """One request in the spool, in the order of ``number``; ``time`` is in seconds since the epoch."""

    number: int
    id: str
    time: float
    payload: bytes
    headers: bytes | None

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

    def submission(self) -> Submission:
        """What is to be submitted; raise :class:`BadRequest` where the request is not a valid one."""
        return Submission(self.request(), orjson.loads(self.headers) if self.headers else {}, tried=True)


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
            self._prepare()
        except (OSError, sqlite3.Error) as error:
            raise ConfigurationError(f"fleet.spool_path: {path} cannot be used as a spool: {error}") from error

    def _prepare(self) -> None:
        with self._transaction() as file:
            file.execute(_SCHEMA)
            if "headers" not in [column[1] for column in file.execute("PRAGMA table_info(spool)")]:
                file.execute("ALTER TABLE spool ADD COLUMN headers BLOB")  # release 0.1.0 made the file

    def add(self, submissions: Sequence[Submission]) -> None:
        """Keep all of them or, where they do not fit or the disk fails, none: then :class:`SpoolFull` is raised.

        A request whose id is there already is there once.
        """
        now = time.time()
        rows = []
        for submission in submissions:
            request = submission.request
            fields = request.model_dump(mode="json", exclude_defaults=True) | {"id": request.id}
            headers = orjson.dumps(dict(submission.headers)) if submission.headers else None
            rows.append((request.id, now, orjson.dumps(fields), headers))
        away = f"cannot submit: the broker is away, and {self.path}"
        try:
            with self._transaction() as file:
                file.executemany("INSERT OR IGNORE INTO spool (id, time, request, headers) VALUES (?, ?, ?, ?)", rows)
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
                "SELECT number, id, time, request, headers FROM spool WHERE number > ? ORDER BY number LIMIT ?",
                (after, limit),
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
