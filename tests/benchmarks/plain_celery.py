"""Plain Celery doing what the fake engine does: a yardstick of the queue benchmark."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery

from tests.benchmarks.plain_answer import plain_answer

url = os.environ["REDIS_URL"]
app = Celery("plain", broker=url, backend=url)
app.conf.task_default_queue = "plain"


@app.task(name="plain.infer")
def infer(request: dict[str, Any]) -> dict[str, Any]:
    """The fake answer."""
    return plain_answer(request)
