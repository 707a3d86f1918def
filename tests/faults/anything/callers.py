"""Those who ask: each way is a function of the scene and the caller, run on a thread of its own."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Mapping

from tests.faults.anything import by_celery, by_client
from tests.faults.anything.composition import Caller
from tests.faults.anything.scene import Scene

WAYS: Mapping[str, Callable[[Scene, Caller], None]] = {
    "client": by_client.submitting,
    "asyncio": by_client.awaiting,
    "map": by_client.mapping,
    "async map": by_client.mapping_async,
    "batch": by_client.batch,
    "forked": by_client.forked,
    "again": by_client.again,
    "conflict": by_client.conflict,
    "celery": by_celery.sending,
    "celery again": by_celery.again,
    "chain": by_celery.chained,
    "group": by_celery.grouped,
    "chord": by_celery.chord_awaited,
    "chord body": by_celery.body_awaited,
}


def start(scene: Scene, caller: Caller) -> threading.Thread:
    """The caller's thread, which begins at the caller's time. What it cannot explain is trouble."""

    def work() -> None:
        scene.wait_until(caller.at)
        try:
            WAYS[caller.how](scene, caller)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            scene.book.trouble(f"{caller.how}: {type(error).__name__}: {error} (line {where.lineno} of {where.name})")

    thread = threading.Thread(target=work, name=f"caller {caller.how}", daemon=True)
    thread.start()
    return thread


def wait_all(threads: list[threading.Thread], until: float) -> list[str]:
    """Wait for callers until a time (monotonic); the names of those that are not through."""
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    return [thread.name for thread in threads if thread.is_alive()]
