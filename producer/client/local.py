"""What a client has of its own in each process, and in each event loop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Local(Generic[T]):
    """One value for each place, made when it is first asked for there.

    ``place`` names the place where it is called: the process, for what must not be used after a fork, where connections
    would be shared and threads are gone. What was made elsewhere is kept, and neither used nor closed: it is in use
    there. Safe to use from several threads, and after a fork, whatever the threads of the parent were doing.
    """

    def __init__(self, make: Callable[[], T], place: Callable[[], Hashable]) -> None:
        self._make = make
        self._place = place
        self._made: dict[Hashable, T] = {}
        self._locks: dict[Hashable, threading.Lock] = {}

    def get(self) -> T:
        """The value of this place."""
        place = self._place()
        try:
            return self._made[place]
        except KeyError:
            pass
        with self._locks.setdefault(place, threading.Lock()):  # one of this place: another may be held in the parent
            if place not in self._made:
                self._made[place] = self._make()
            return self._made[place]

    def pop(self) -> T | None:
        """The value of this place, where one was made; it is made anew when it is next asked for."""
        return self._made.pop(self._place(), None)

    def drop(self, dead: Callable[[T], bool]) -> None:
        """Let go of the values that are dead."""
        for place, value in list(self._made.items()):
            if dead(value):
                del self._made[place]
                self._locks.pop(place, None)
