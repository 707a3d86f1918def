"""One of several threads works for all, the others wait: for what they want, or for their turn to do the work."""

from __future__ import annotations

import threading
from collections import deque


class Turns:
    """Who works, and who waits for the turn."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queue: deque[threading.Event] = deque()
        self.taken = False

    def take(self) -> bool:
        """Take the turn, unless somebody has it."""
        with self._lock:
            taken, self.taken = self.taken, True
        return not taken

    def take_or_queue(self) -> threading.Event | None:
        """The same; where somebody has it, an event that is set when it is this thread's turn to try again."""
        with self._lock:
            if not self.taken:
                self.taken = True
                return None
            event = threading.Event()
            self._queue.append(event)
            return event

    def give_up(self) -> bool:
        """End the turn; whether it was offered to somebody."""
        with self._lock:
            self.taken = False
            return self._offer()

    def leave(self, event: threading.Event) -> None:
        """Wait no longer. A turn that was offered meanwhile goes on to the next."""
        with self._lock:
            if event in self._queue:
                self._queue.remove(event)
            elif not self.taken:
                self._offer()

    def _offer(self) -> bool:
        if not self._queue:
            return False
        self._queue.popleft().set()
        return True
