"""Flower, where it is this app's: it asks the fleet's broker, wherever that is, and sees tenants' lanes.

By itself it connects as the URL says, to database 0 of a socket or of sentinels, and counts the lists that kombu knows.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable
from functools import partial
from typing import Any

import redis

from shared.queues import waiting

VIEWS = "flower.views"
"""Its module that asks; Celery's command imports it, whatever it is to do, where Flower is installed."""


class Queues:
    """What Flower asks of a broker: takes the place of its own. Checked against Flower 2.2."""

    def __init__(self, client: redis.Redis, *_: Any, **__: Any) -> None:
        self._client = client

    async def queues(self, names: Iterable[str]) -> list[dict[str, Any]]:
        """How many messages wait on each queue."""
        counts = await asyncio.to_thread(waiting, self._client, list(names))
        return [{"name": name, "messages": count} for name, count in counts.items()]


def teach(client: redis.Redis) -> None:
    """Have Flower, where it is here, count with this client."""
    views = sys.modules.get(VIEWS)
    if views is not None:
        views.Broker = partial(Queues, client)  # type: ignore[attr-defined]
