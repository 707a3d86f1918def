"""How a request can end, as values. What follows from each is decided in :mod:`workers.ends`, and is in one table in
``docs/life-of-a-request.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from shared.contract import EngineName
from shared.errors import Cancelled, DeadlineExceeded, FleetError
from workers.requests.inflight import InFlight


class End(StrEnum):
    """The ways in which a request leaves a worker."""

    RESULT = "result"
    """It was answered."""
    FAILURE = "failure"
    """It failed for good: its caller is told why."""
    CANCEL = "cancel"
    """Nobody wants it any longer."""
    EXPIRY = "expiry"
    """Its ``expires`` passed before it was started."""
    HOP = "hop"
    """It goes on to the queue of another engine."""
    DELAY = "delay"
    """It waits in the broker until a time."""
    DEAD_LETTER = "dead letter"
    """It was delivered too often: it failed, and its message is kept."""
    GIVE_BACK = "give-back"
    """It returns to the front of its queue."""
    REFUSAL = "refusal"
    """Its message makes no sense, or may not run here: it failed, and its message is kept."""
    DUPLICATE = "duplicate"
    """Its message is one too many: the request has its answer."""


FINAL = frozenset({End.RESULT, End.FAILURE, End.CANCEL, End.EXPIRY, End.DEAD_LETTER, End.REFUSAL})
"""The ends after which nothing more comes: whoever waits on the request is told."""

FRONT = frozenset({End.HOP, End.GIVE_BACK})
"""The ends after which the message goes to the front of a list."""


@dataclass(slots=True)
class Ending:
    """How one request ends. Build one with the methods, which say what each way needs.

    Not frozen, though nobody changes it: one is made for each request, and a frozen one takes three times as long.

    ``error`` is what its caller is told, or, where it hops, what failed here (``None``: nothing did); ``reason`` what
    an operator is told of a dead letter, where that is something else. ``at`` is in seconds since the epoch. ``worker``
    should have it next, after those that it has ``passed``.
    """

    item: InFlight
    end: End
    error: FleetError | None = None
    result: Mapping[str, Any] | None = None
    encoded: bytes = b""
    seconds: float = 0.0
    to: EngineName | None = None
    here: EngineName | None = None
    at: float = 0.0
    reason: str = ""
    redelivered: bool = False
    worker: str = ""
    passed: tuple[str, ...] = ()

    @classmethod
    def answered(cls, item: InFlight, result: Mapping[str, Any], encoded: bytes, seconds: float) -> Ending:
        """It was answered after running for so long; ``encoded`` is the result as JSON."""
        return cls(item, End.RESULT, result=result, encoded=encoded, seconds=seconds)

    @classmethod
    def failed(cls, item: InFlight, error: FleetError) -> Ending:
        """It failed for good."""
        return cls(item, End.FAILURE, error)

    @classmethod
    def late(cls, item: InFlight, *reasons: str) -> Ending:
        """Its deadline has passed; ``reasons`` are what kept it from being answered, beside engines that failed."""
        kept = [*(f"{hop.engine}: {hop.error}" for hop in item.hops), *reasons]
        return cls.failed(
            item, DeadlineExceeded(f"the request's deadline passed ({'; '.join(kept)})" if kept else None)
        )

    @classmethod
    def cancelled(cls, item: InFlight) -> Ending:
        """Its caller, or an operator, has cancelled it."""
        return cls(item, End.CANCEL, Cancelled())

    @classmethod
    def expired(cls, item: InFlight) -> Ending:
        """Its ``expires`` passed."""
        return cls(item, End.EXPIRY, Cancelled("the task expired before it was started"))

    @classmethod
    def hops(cls, item: InFlight, to: EngineName, error: FleetError | None, *, here: EngineName, now: float) -> Ending:
        """It goes on to the queue of ``to``; ``error`` is what failed ``here``, where anything did."""
        return cls(item, End.HOP, error, to=to, here=here, at=now)

    @classmethod
    def delayed(cls, item: InFlight, due: float) -> Ending:
        """It waits in the broker until ``due``."""
        return cls(item, End.DELAY, at=due)

    @classmethod
    def dead(cls, item: InFlight, error: FleetError, reason: str) -> Ending:
        """It was delivered too often, and is given up."""
        return cls(item, End.DEAD_LETTER, error, reason=reason)

    @classmethod
    def given_back(cls, item: InFlight) -> Ending:
        """It returns to the front of its queue as it was."""
        return cls(item, End.GIVE_BACK)

    @classmethod
    def passed_on(cls, item: InFlight, here: str, worker: str) -> Ending:
        """It returns to the front of its queue for another ``worker``: the one ``here`` cannot answer it in time."""
        return cls(item, End.GIVE_BACK, worker=worker, passed=(*item.passed, here))

    @classmethod
    def redelivery(cls, item: InFlight) -> Ending:
        """The worker that had it is gone: it returns to the front of its queue, with one delivery more."""
        return cls(item, End.GIVE_BACK, redelivered=True)

    @classmethod
    def refused(cls, item: InFlight, error: FleetError) -> Ending:
        """Its message makes no sense, or may not run."""
        return cls(item, End.REFUSAL, error)

    @classmethod
    def duplicate(cls, item: InFlight) -> Ending:
        """Another message of this id has been answered."""
        return cls(item, End.DUPLICATE)
