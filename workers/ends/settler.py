"""One way to end: for every way in which a request ends, who is told, what is written and who is answered, in order.

The rest of its canvas is told first (what is published twice has the same id, what is not published is lost), then the
lease ends together with everything that is written, and then, where that stands, the observers are told. What each end
comes to is in one table in ``docs/life-of-a-request.md``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from traceback import format_tb

from kombu.exceptions import OperationalError

from shared.errors import EngineError
from workers.broker.delivery import Delivery, Settlement, Written, lease_order
from workers.broker.errors import BROKER_ERRORS, refused
from workers.broker.leases import Leases
from workers.broker.seal import Seal
from workers.ends.canvas import Canvas
from workers.ends.settlements import settlement_of
from workers.observe.observers import Observers
from workers.requests.ending import FINAL, FRONT, Ending
from workers.requests.inflight import InFlight

logger = logging.getLogger(__name__)


def oldest_in_front(endings: Iterable[Ending]) -> list[Ending]:
    """The order in which these are to be written: of what goes to the front of a list, the oldest last."""
    others, back = list[Ending](), list[Ending]()
    for ending in endings:
        (back if ending.end in FRONT else others).append(ending)
    back.sort(key=lambda ending: (ending.item.claimed, lease_order(ending.item.lease)), reverse=True)
    return [*others, *back]


class Settler:
    """Ends requests. Whoever finds an end goes through it: intakes by their outbox, everybody else by :meth:`end`."""

    def __init__(self, delivery: Delivery, leases: Leases, observers: Observers, canvas: Canvas, seal: Seal) -> None:
        self.delivery = delivery
        self.leases = leases
        self.seal = seal
        self._observers = observers
        self._canvas = canvas

    def end(self, endings: Sequence[Ending], *, on_loop: bool = True) -> list[Written]:
        """End requests now; says what came of each. Off the loop the observers are told when the loop looks next."""
        if not endings:
            return []
        prepared = [self.prepare(ending) for ending in endings]
        written = self.delivery.settle([settlement for _, settlement in prepared])
        self.conclude([ending for ending, _ in prepared], written, on_loop=on_loop)
        return written

    def prepare(self, ending: Ending) -> tuple[Ending, Settlement]:
        """Tell the rest of the canvas; returns what is to be written, and the ending that it is of.

        A request whose next step cannot be published, or whose answer cannot be written, has failed. Raises what a
        broker that fails raises: then nothing was decided, and it is to be tried again when it is back.
        """
        try:
            return ending, settlement_of(ending, self._canvas.tell(ending), self.seal.sealed)
        except BROKER_ERRORS as error:
            if not refused(error):
                if isinstance(error, OperationalError):  # Celery's word for it
                    raise ConnectionError(str(error)) from error
                raise
            name = type(error).__name__
            logger.error("the broker refuses what follows request %s: %s", ending.item.id, error)
        except Exception as error:  # noqa: BLE001  # the boundary: what cannot be written is its own request's failure
            # Its text may quote what the engine was given or has answered.
            name = type(error).__name__
            logger.error("the end of request %s cannot be written: %s\n%s", ending.item.id, name, frames(error))
        if ending.end in FINAL and ending.error is not None:  # it is only its canvas that could not be told
            return ending, settlement_of(ending)
        failure = EngineError(f"the answer, or what is to follow it, cannot be written: {name}")
        return self.prepare(Ending.failed(ending.item, failure))

    def conclude(self, endings: Sequence[Ending], written: Sequence[Written], *, on_loop: bool = True) -> None:
        """It was written: the leases are let go, and the observers told."""
        tell = self._observers.tell if on_loop else self._observers.post
        if on_loop:
            self.leases.release([ending.item.lease for ending in endings])
        for ending, came in zip(endings, written, strict=True):
            tell(*_told(ending, came))


def _told(ending: Ending, came: Written) -> tuple[str, Ending | InFlight]:
    """The step that the observers are told of, and what."""
    if came is Written.DONE:
        return "request_ended", ending
    if came is Written.CANCELLED:
        return "request_ended", Ending.cancelled(ending.item)
    return "request_left", ending.item


def frames(error: BaseException) -> str:
    """Where an error was raised, without its text."""
    return "".join(format_tb(error.__traceback__))
