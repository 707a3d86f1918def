"""dramatiq doing what the fake engine does: a yardstick of the queue benchmark. Results are kept, as ours are."""

from __future__ import annotations

import os
from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

from tests.benchmarks.plain_answer import plain_answer

url = os.environ["REDIS_URL"]
broker = RedisBroker(url=url)
broker.add_middleware(Results(backend=RedisBackend(url=url)))
dramatiq.set_broker(broker)


@dramatiq.actor(store_results=True)
def infer(request: dict[str, Any]) -> dict[str, Any]:
    """The fake answer."""
    return plain_answer(request)
