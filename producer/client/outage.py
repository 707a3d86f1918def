"""What submitting does while the broker is away: raise an error, wait, or spool."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

from producer.client.spool_file import Spool
from producer.client.spool_sender import Answer, Send, SpoolSender
from producer.client.submission import Submission
from shared.errors import BrokerRefused, BrokerUnavailable, NoEngineAvailable
from shared.settings import FleetSettings, OnOutage

PAUSE_FIRST, PAUSE_LONGEST = 0.1, 2.0
"""Seconds between two tries."""


class Waiting:
    """Submits again until the broker is back, or the first of the requests' deadlines has come.

    Right after an outage the workers may not have announced themselves yet: they are waited for as well, for
    ``silent_after`` seconds.
    """

    def __init__(self, send: Send, silent_after: float) -> None:
        self._send = send
        self._silent_after = silent_after
        self._closed = threading.Event()

    def submit(self, submissions: Sequence[Submission]) -> None:
        """Submit; raises what the last try raised."""
        deadlines = [submission.request.deadline for submission in submissions]
        last = min((deadline for deadline in deadlines if deadline is not None), default=float("inf"))
        pause, back = PAUSE_FIRST, float("inf")
        away = False
        while True:
            try:
                self._send(submissions)
                return
            except BrokerRefused:
                raise
            except BrokerUnavailable:
                away, back = True, float("inf")
                if time.time() + pause >= last or self._closed.wait(pause):
                    raise
            except NoEngineAvailable:
                back = min(back, time.monotonic())
                if not away or time.monotonic() - back > self._silent_after or self._closed.wait(pause):
                    raise
            pause = min(2 * pause, PAUSE_LONGEST)

    def close(self) -> None:
        """Let those who wait go, with the error."""
        self._closed.set()


class Raising:
    """Submits once."""

    def __init__(self, send: Send) -> None:
        self.submit = send

    def close(self) -> None:
        """Nothing to do."""


def outage_policy(
    on_outage: OnOutage, fleet: FleetSettings, send: Send, answer: Answer
) -> Raising | Waiting | SpoolSender:
    """The policy that ``on_outage`` names; it submits with ``send`` and tells ``answer`` of what it gives up later."""
    if on_outage == "wait":
        return Waiting(send, fleet.silent_after_seconds)
    if on_outage == "spool":
        sender = SpoolSender(Spool(Path(fleet.spool_path), fleet.spool_max_bytes), send, answer)
        sender.start()
        return sender
    return Raising(send)
