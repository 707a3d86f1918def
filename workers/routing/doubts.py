"""Looks for requests that were submitted again while they were thought to be under way.

An id under way is not pushed twice, so one whose message is gone (a queue was purged, a broker lost a key) could never
be submitted again. What is under way is on a list, delayed or leased; what is submitted again and is not is pushed.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import orjson
import redis

from shared import keys
from shared.broker import lua
from shared.contract import EngineName

logger = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
"""How often it is looked whether there is something to look for."""

BUDGET_SECONDS = 0.015
"""For how long the loop is held at once."""

AT_ONCE = 200
"""Requests that are looked for together."""

PAGE = 200
"""Messages that one script looks at."""

MINE_SECONDS = 60.0
"""For how long no other worker looks too."""


class Doubts:
    """Looks for what is doubted. Call :meth:`tend` often; it holds the loop for a moment only.

    Raises what a broker that fails raises; what was begun is begun anew, when it is back.
    """

    def __init__(self, client: redis.Redis, worker_id: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._worker_id = worker_id
        self._clock = clock
        self._begin = client.register_script(lua("workers.broker", "doubted"))
        self._page = client.register_script(lua("workers.broker", "look"))
        self._restore = client.register_script(lua("workers.broker", "restore"))
        self._looking: Iterator[None] | None = None
        self._next = 0.0

    def tend(self) -> None:
        """Go on looking, or see whether there is something to look for."""
        now = self._clock()
        if self._looking is None:
            if now < self._next:
                return
            self._next = now + LOOK_SECONDS
            names = [keys.DOUBTED, keys.UNDER_WAY, keys.DOUBTING]
            rows = self._begin(keys=names, args=[self._worker_id, int(MINE_SECONDS * 1000), AT_ONCE])
            if not rows:
                return
            self._looking = self._look({rows[i].decode(): rows[i + 1] for i in range(0, len(rows), 2)})
        looking, self._looking = self._looking, None
        for _ in looking:
            if self._clock() >= now + BUDGET_SECONDS:
                self._looking = looking
                return

    def _look(self, doubted: Mapping[str, bytes]) -> Iterator[None]:
        """Look everywhere, a page at a time: the lists twice, since a message may go back to one meanwhile."""
        missing = dict(doubted)
        for places in (self._lists, lambda: [keys.LEASE_MESSAGES], self._lists):
            for place in places():
                at = b"0"
                while missing:
                    at, found = self._page(keys=[place], args=self._terms(place, at, missing))
                    for name in found:
                        missing.pop(str(orjson.loads(b'"' + name + b'"')), None)
                    yield
                    if at == b"0":
                        break
        args: list[str | bytes] = []
        for request_id, submitted in doubted.items():
            args += (request_id, submitted, str(int(request_id in missing)))
        pushed: Any = self._restore(keys=[keys.DOUBTED, keys.UNDER_WAY, keys.DOUBTING], args=args)
        if pushed:
            logger.warning("%d requests that were submitted again had no message any longer: pushed anew", len(pushed))

    def _lists(self) -> Sequence[str]:
        """All lists that requests wait on."""
        found = []
        for shared in (name for engine in EngineName for name in keys.lists_of(keys.queue_of(engine))):
            found.append(shared)
            tenants: Any = self._client.zrange(f"muai:lanes:{shared}", 0, -1)
            for tenant in {b"", *tenants}:
                lane = keys.LANE_PREFIX + shared + ":" + tenant.decode()
                affinities: Any = self._client.hkeys(f"muai:lanes:{shared}:{tenant.decode()}")
                found += [lane] * bool(tenant) + [f"{lane}@{affinity.decode()}" for affinity in affinities]
        return found

    def _terms(self, place: str, at: bytes, missing: Mapping[str, bytes]) -> list[str | bytes | int]:
        spelt = {text[1:-1] for name in missing for text in (orjson.dumps(name).decode(), json.dumps(name))}
        return ["leases" if place == keys.LEASE_MESSAGES else "list", at, PAGE, *spelt]
