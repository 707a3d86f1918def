"""What a running call of an engine has made so far: when each request had its first token, and that it goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from workers.engines.base import NewTokens
from workers.requests.inflight import InFlight

Made = Sequence[tuple[InFlight, int]]
"""Requests, each with how many more tokens it has."""


class Progress:
    """Listens to the tokens of an engine's models. From any thread.

    ``report`` is called with what a step has made, where somebody ``listens``; ``clock`` tells seconds since the epoch.
    """

    def __init__(self, report: Callable[[Made], None], listens: Callable[[], bool], clock: Callable[[], float]) -> None:
        self._clock = clock
        self._report = report
        self._listens = listens
        self._running: dict[str, InFlight] = {}
        self._last = float("-inf")

    @property
    def last(self) -> float | None:
        """When what runs has begun or made something last, by the steady clock; ``None`` where nothing runs."""
        return self._last if self._running else None

    def step(self) -> None:
        """The engine has finished something of what runs."""
        self._last = time.monotonic()

    def begin(self, items: Iterable[InFlight]) -> None:
        """The engine is given these."""
        self._last = time.monotonic()
        self._running.update((item.request.id, item) for item in items if item.request is not None)

    def end(self, items: Iterable[InFlight]) -> None:
        """The engine is through with these."""
        for item in items:
            if item.request is not None and self._running.get(item.request.id) is item:
                del self._running[item.request.id]

    def tell(self, made: Sequence[NewTokens]) -> None:
        """A step of the engine has made these; see :data:`workers.engines.base.OnTokens`."""
        self._last, now = time.monotonic(), self._clock()
        found = [(item, len(new.token_ids)) for new in made if (item := self._running.get(new.request_id)) is not None]
        for item, count in found:
            if count and not item.first_token:
                item.first_token = now
        if found and self._listens():
            self._report(found)

    def quiet_seconds(self) -> float | None:
        """How long ago what runs has begun or made something; ``None`` where nothing runs."""
        return time.monotonic() - self._last if self._running else None
