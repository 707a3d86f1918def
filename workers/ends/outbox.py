"""How requests end: their outcomes are gathered, written together, and told to observers once they stand."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import redis
from kombu.exceptions import OperationalError

from shared.contract import EngineName
from shared.errors import Cancelled, FleetError
from workers.broker.delivery import Delivery, Settlement
from workers.broker.leases import LeaseKeeper
from workers.ends import ending
from workers.ends.canvas import Canvas
from workers.observe.celery_events import TaskObserver
from workers.requests.inflight import InFlight

logger = logging.getLogger(__name__)

AT_ONCE = 256
"""Outcomes that one script writes."""

BROKER_ERRORS = (redis.RedisError, OperationalError, OSError)
"""What a broker that fails raises, by way of the client library, of Celery, or of the socket."""


class _Ended:
    """An outcome to write, what must be done before it is, and what is told to observers after."""

    __slots__ = ("after", "before", "item", "outcome")

    def __init__(
        self, item: InFlight, ended: Settlement, after: Callable[[], None], before: Callable[[], None] | None = None
    ) -> None:
        item.ended = True
        self.item = item
        self.outcome = ended
        self.after = after
        self.before = before


class Outbox:
    """The ends of requests that are not written yet. ``settled`` counts those that were."""

    def __init__(self, delivery: Delivery, leases: LeaseKeeper, observer: TaskObserver, canvas: Canvas) -> None:
        self._delivery = delivery
        self._leases = leases
        self._observer = observer
        self._canvas = canvas
        self._waiting: list[_Ended] = []
        self.settled = 0

    def succeed(
        self, item: InFlight, result: dict[str, Any], encoded: bytes, children: list[Any], seconds: float
    ) -> None:
        """The request was answered, after running for so long; ``encoded`` is the result as JSON."""
        after = partial(self._observer.succeeded, item, result, seconds)
        self._waiting.append(_Ended(item, ending.succeeded(item, encoded, children), after))

    def fail(self, item: InFlight, error: FleetError) -> None:
        """The request failed for good; the rest of its canvas is told first."""
        after = partial(self._observer.failed, item, error)
        before = partial(self._canvas.failed, item, error)
        self._waiting.append(_Ended(item, ending.failed(item, error), after, before))

    def bury(self, item: InFlight, error: FleetError) -> None:
        """The message makes no sense: it becomes a dead letter."""
        self._waiting.append(_Ended(item, ending.failed(item, error, dead_reason=str(error)), lambda: None))

    def revoke(self, item: InFlight, error: Cancelled, *, expired: bool) -> None:
        """The request is not wanted any longer."""
        after = partial(self._observer.revoked, item, expired)
        self._waiting.append(_Ended(item, ending.revoked(item, error), after))

    def hop(self, item: InFlight, to: EngineName, error: FleetError | None, here: EngineName, now: float) -> None:
        """The request goes on to the queue of another engine; ``error`` is what failed here, if anything did."""
        after = self._given_back(item) if error is None else partial(self._observer.retried, item, error)
        self._waiting.append(_Ended(item, ending.hopped(item, to, error, here, now), after))

    def delay(self, item: InFlight, due: float) -> None:
        """The message waits in the broker until ``due`` (seconds since the epoch)."""
        self._waiting.append(_Ended(item, ending.delayed(item.lease, due), self._given_back(item)))

    def give_back(self, item: InFlight) -> None:
        """The message returns to the front of its queue as it was."""
        self._waiting.append(_Ended(item, Settlement.give_back(item.lease), self._given_back(item)))

    def drop(self, item: InFlight) -> None:
        """The message is one too many: its request has its answer."""
        self._waiting.append(_Ended(item, Settlement(item.lease), self._given_back(item)))

    def _given_back(self, item: InFlight) -> Callable[[], None]:
        return partial(self._observer.given_back, item)

    def flush(self, wait: bool = False) -> None:
        """Write every outcome that waits. Where the broker fails they stay, and are written when it is back.

        The loop takes in later what has become of them, unless it is to ``wait``.
        """
        while self._waiting:
            chunk = self._waiting[:AT_ONCE]
            for ended in chunk:
                self._prepare(ended)
            del self._waiting[: len(chunk)]
            self._delivery.settle_soon(
                [ended.outcome for ended in chunk], partial(self._settled, chunk), partial(self._lost, chunk)
            )
        if wait:
            self._delivery.scripts.wait()

    def _settled(self, chunk: list[_Ended], written: list[bool]) -> None:
        self._leases.release([ended.outcome.lease for ended in chunk])
        self.settled += len(chunk)
        for ended, stands in zip(chunk, written, strict=True):
            if stands:
                ended.after()
            else:  # another worker has it, or it had its answer before
                self._observer.given_back(ended.item)

    def _lost(self, chunk: list[_Ended]) -> None:
        self._waiting[:0] = chunk

    def _prepare(self, ended: _Ended) -> None:
        """Do what comes before an outcome, once; where the broker fails it is tried again when it is back."""
        if ended.before is None:
            return
        try:
            ended.before()
        except OperationalError as error:
            raise ConnectionError(str(error)) from error
        except BROKER_ERRORS:
            raise
        except Exception:  # the boundary: a canvas that cannot be told keeps no request from its answer
            logger.exception("the canvas of a failed request cannot be told")
        ended.before = None
