"""What submitting does while the broker is away: raise an error, wait, or spool."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from producer.client.spool_sender import SpoolSender
from producer.client.steps import Command, Pause, Steps, Work
from producer.client.submission import Submission
from shared.broker import broker_errors
from shared.clock import BrokerClock
from shared.errors import BrokerRefused, BrokerUnavailable, NoEngineAvailable, UnknownModel, UnsupportedKind
from shared.settings import FleetSettings

logger = logging.getLogger(__name__)

PAUSE_FIRST, PAUSE_LONGEST = 0.1, 2.0
"""Seconds between two tries."""

_UPTIME = re.compile(rb"^uptime_in_seconds:(\d+)", re.MULTILINE)

Submit = Callable[[Sequence[Submission]], Steps[None]]
"""Submits requests: all of them or, where one is refused, none."""


NOT_SERVED = (NoEngineAvailable, UnknownModel, UnsupportedKind)
"""What is said of a request that the workers who have announced themselves do not serve."""


def waiting(
    send: Submit,
    restarted: Callable[[], Steps[bool]],
    silent_after: float,
    clock: BrokerClock,
    submissions: Sequence[Submission],
) -> Steps[None]:
    """Submit again until the broker is back, or the first of the requests' deadlines has come.

    Right after an outage the workers may not have announced themselves yet: they are waited for as well, for
    ``silent_after`` seconds. So they are where the broker was ``restarted`` while nobody was looking. Raises what the
    last try raised.
    """
    pause, there, away = PAUSE_FIRST, float("inf"), False
    while True:
        try:
            yield from send(submissions)
            return
        except BrokerRefused:
            raise
        except BrokerUnavailable:
            away, there = True, float("inf")
            submissions = [replace(submission, tried=True) for submission in submissions]
            deadlines = [submission.by(clock).request.deadline for submission in submissions]
            last = min((deadline for deadline in deadlines if deadline is not None), default=float("inf"))
            if clock() + pause >= last:
                raise
        except NOT_SERVED:
            there = min(there, time.monotonic())
            away = away or (yield from restarted())
            if not away or time.monotonic() - there > silent_after:
                raise
        yield Pause(pause)
        pause = min(2 * pause, PAUSE_LONGEST)


def restarted(fleet: FleetSettings) -> Steps[bool]:
    """Whether the broker was started so short a time ago that its workers may not have announced themselves yet."""
    try:
        with broker_errors(fleet, "ask how long it runs"):
            answer = yield Command(("INFO", "server"))
    except BrokerUnavailable:
        return False
    found = _UPTIME.search(answer)
    return found is not None and int(found[1]) < fleet.silent_after_seconds


def spooling(send: Submit, sender: SpoolSender, submissions: Sequence[Submission]) -> Steps[None]:
    """Submit, or spool where the broker is away or others wait in the spool already."""
    if not sender.behind:
        try:
            yield from send(submissions)
            return
        except BrokerRefused:
            raise
        except BrokerUnavailable as error:
            logger.warning("requests are spooled to %s: %s", sender.path, error)
    yield Work(partial(sender.keep, submissions))
