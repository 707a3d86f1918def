"""A model load that takes long, or more memory than there is: what is said of it, and what is done."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from shared.errors import EngineOutOfMemory

logger = logging.getLogger(__name__)

SAY_SECONDS = 30.0
"""How often it is said that a model is still being loaded."""

_OUT_OF_MEMORY = ("OutOfMemoryError", "MemoryError")
"""The names that libraries have for it. None of them is imported for that."""


@contextmanager
def said(engine: str, model: str, every: float = SAY_SECONDS) -> Iterator[None]:
    """Say now and then that a model is still being loaded, for whoever waits and reads the log."""
    over, started = threading.Event(), time.monotonic()

    def say() -> None:
        while not over.wait(every):
            logger.info("%s: %s is being loaded, for %.0f s now", engine, model, time.monotonic() - started)

    thread = threading.Thread(target=say, name=f"loading-{model}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it came of, is for want of memory."""
    while error is not None:
        if isinstance(error, EngineOutOfMemory) or type(error).__name__ in _OUT_OF_MEMORY:
            return True
        error = error.__cause__ or error.__context__
    return False


def let_go(error: BaseException | None) -> None:
    """Let go of what the frames hold that an error, and those that it came of, went through: half a model's weights."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
