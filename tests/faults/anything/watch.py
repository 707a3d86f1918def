"""Looks on while a composition runs: how late the machine is, and what tenants have in flight."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Self

import redis

from shared import keys

LOOK_SECONDS = 0.05


class Watch:
    """Looks every so often while its block lasts.

    ``lag`` is how many seconds this process got its turns late, all together: on a busy machine everything is late.
    """

    def __init__(self, url: str) -> None:
        self.lag = 0.0
        self.most_in_flight: dict[str, int] = {}
        self._redis = redis.Redis.from_url(url, socket_timeout=0.5, socket_connect_timeout=0.5, decode_responses=True)
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._look, self._count)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        for thread in self._threads:
            thread.join()
        self._redis.close()

    def _look(self) -> None:
        while True:
            before = time.monotonic()
            if self._closed.wait(LOOK_SECONDS):
                return
            self.lag += max(0.0, time.monotonic() - before - 2 * LOOK_SECONDS)

    def _count(self) -> None:
        while not self._closed.wait(LOOK_SECONDS):
            with suppress(redis.RedisError):
                for tenant, count in self._redis.hgetall(keys.IN_FLIGHT).items():
                    self.most_in_flight[tenant] = max(int(count), self.most_in_flight.get(tenant, 0))
