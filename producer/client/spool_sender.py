"""Delivering what is in a spool, once the broker is back."""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from producer.client.records import Outcome
from producer.client.spool_file import AT_ONCE, Spool, Spooled
from producer.client.submission import Submission
from shared.errors import BadRequest, BrokerUnavailable, DeadlineExceeded, FleetError

logger = logging.getLogger(__name__)

PAUSE_FIRST, PAUSE_LONGEST = 0.25, 2.0
"""Seconds between two tries to deliver."""

Send = Callable[[Sequence[Submission]], object]
Answer = Callable[[str, Outcome], None]


class SpoolSender:
    """Delivers what is in a spool, the oldest first, from a thread of its own.

    While the broker is away new requests go behind what is there. ``send`` submits requests, each id
    once however often it is called; ``answer`` is told of those that cannot be submitted at all; ``clock`` tells the
    time by which deadlines are reckoned.
    """

    def __init__(
        self, spool: Spool, send: Send, answer: Answer | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._clock = clock
        self._spool = spool
        self._send = send
        self._answer = answer
        self._kept = 0
        self._lock = threading.Lock()
        self._behind = len(spool) > 0
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Deliver what is there already."""
        if self._behind:
            self._start()

    @property
    def path(self) -> Path:
        """The spool's file."""
        return self._spool.path

    @property
    def behind(self) -> bool:
        """Whether requests wait in the spool for the broker: what comes meanwhile goes behind them."""
        return self._behind

    def keep(self, submissions: Sequence[Submission]) -> None:
        """Put requests into the spool, and deliver them when the broker is back."""
        with self._lock:
            self._spool.add(submissions)
            self._behind = True
            self._kept += 1
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
                self._send([entry.submission() for entry in batch])
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
            submission = entry.submission()
            if submission.request.expired(self._clock()):
                raise DeadlineExceeded("the request's deadline passed while the broker was away")
            self._send([submission])
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
            away, kept = False, self._kept
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
                if kept == self._kept:
                    self._behind = left and away  # what nobody serves holds nobody up
                if not left and not self._closed.is_set():
                    self._wake.clear()
                    continue
            self._closed.wait(pause)
            pause = min(2 * pause, PAUSE_LONGEST)
