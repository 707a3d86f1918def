"""The ends of an engine's requests that are not written yet: gathered, and written together."""

from __future__ import annotations

import logging
from collections import deque
from functools import partial

from workers.broker.delivery import Settlement, Written
from workers.broker.errors import BROKER_ERRORS
from workers.ends.settler import Settler, oldest_in_front
from workers.requests.ending import FINAL, Ending
from workers.requests.inflight import State
from workers.requests.table import RequestTable

logger = logging.getLogger(__name__)

AT_ONCE = 256
"""Settlements that one script writes."""

Prepared = tuple[Ending, Settlement]


class Outbox:
    """Ends the requests of a table. For the loop only."""

    def __init__(self, settler: Settler, table: RequestTable) -> None:
        self._settler = settler
        self._table = table
        self._decided: deque[Ending] = deque()
        self._prepared: list[Prepared] = []
        self._untold: list[Ending] = []
        self._level = logging.WARNING

    def add(self, ending: Ending) -> None:
        """A request's end is decided; it is written with the next :meth:`flush`."""
        self._table.move(ending.item, State.ENDED)
        self._decided.append(ending)

    def flush(self, wait: bool = False) -> None:
        """Write every end that waits. Where the broker fails they stay, and are written when it is back.

        The loop takes in later what has become of them, unless it is to ``wait``. A canvas is told once, however often
        the writing is tried.
        """
        if len(self._decided) > 1:
            self._decided = deque(oldest_in_front(self._decided))
        while self._decided or self._prepared:
            self._prepare()
            self._send()
        if wait:
            self._settler.delivery.wait()

    def tell_again(self) -> None:
        """Try those again whose canvas could not be told. To be called often: nothing else does it."""
        if self._untold:
            self._decided.extend(self._untold)
            self._untold.clear()
            self._level = logging.DEBUG  # it was said
            try:
                self.flush()
            finally:
                self._level = logging.WARNING

    def _prepare(self) -> None:
        """Tell canvases. One that cannot be told yet keeps no other request from its end, nor the loop from its work.

        After it, those that have a canvas are left for the next time: each would wait for the broker as long.
        """
        while self._decided and len(self._prepared) < AT_ONCE:
            ending = self._decided.popleft()
            if self._untold and ending.end in FINAL and ending.item.may_have_canvas:
                self._untold.append(ending)
                continue
            try:
                self._prepared.append(self._settler.prepare(ending))
            except BROKER_ERRORS as error:
                self._untold.append(ending)
                logger.log(self._level, "who waits for request %s cannot be told yet: %s", ending.item.id, error)

    def _send(self) -> None:
        chunk = self._prepared[:AT_ONCE]
        del self._prepared[: len(chunk)]
        if chunk:
            self._settler.delivery.settle_soon(
                [settlement for _, settlement in chunk], partial(self._settled, chunk), partial(self._lost, chunk)
            )

    def _settled(self, chunk: list[Prepared], written: list[Written]) -> None:
        for ending, _ in chunk:
            self._table.leave(ending.item)
        self._settler.conclude([ending for ending, _ in chunk], written)

    def _lost(self, chunk: list[Prepared]) -> None:
        self._prepared[:0] = chunk
