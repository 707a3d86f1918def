"""Waiting on a condition rather than for a while."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def eventually(condition: Callable[[], Any], timeout: float = 60.0, what: str = "the condition") -> Any:
    """Wait until ``condition()`` is true and return its value."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come true within {timeout} s; last: {value!r}")
        time.sleep(0.02)
