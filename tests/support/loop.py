"""A worker's event loop that turns when a test says so."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count
from typing import Any

from tests.support.clock import ManualClock


class ManualLoop:
    """As much of kombu's hub as :class:`workers.path.execution.Loop` names, by a clock that a test moves.

    As there, what is called soon twice before a turn is called once, and an error drops what else was to be called in
    the same turn. ``on_tick`` is called between what is called soon and what that has called soon.
    """

    def __init__(self, clock: ManualClock) -> None:
        self._clock = clock
        self._soon: dict[Any, tuple[Any, ...]] = {}
        self._timers: list[tuple[float, int, Callable[..., Any], tuple[Any, ...]]] = []
        self._numbers = count()
        self.on_tick: Callable[[], object] = lambda: None

    def call_soon(self, callback: Any, *args: Any) -> None:
        self._soon[callback] = args

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any) -> None:
        heapq.heappush(self._timers, (self._clock() + delay, next(self._numbers), callback, args))

    @property
    def next_timer(self) -> float | None:
        """When the next timer is due."""
        return self._timers[0][0] if self._timers else None

    def turn(self) -> None:
        """Call what is to be called by now."""
        while self._soon or (self._timers and self._timers[0][0] <= self._clock()):
            soon, self._soon = self._soon, {}
            for callback, args in soon.items():
                callback(*args)
            self.on_tick()
            if self._timers and self._timers[0][0] <= self._clock():
                _, _, callback, args = heapq.heappop(self._timers)
                callback(*args)
