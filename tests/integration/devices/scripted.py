"""A GPU whose health is what the test says."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from workers.devices.nvml import Reading


class Scripted:
    """Readings as the test says."""

    def __init__(self) -> None:
        self.problem = ""
        self.reads = 0
        self.closed = threading.Event()

    def read(self) -> Sequence[Reading]:
        """The reading of one GPU."""
        self.reads += 1
        return [Reading("GPU-a", problem=self.problem)]

    def close(self) -> None:
        """Note that it was closed."""
        self.closed.set()
