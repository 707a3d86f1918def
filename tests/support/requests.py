"""A request that every fake worker answers, and who sends it without this project's code."""

from __future__ import annotations

from celery import Celery

ECHO = {"model": "echo", "inputs": {"prompt": "hello"}}


def bare_app(url: str) -> Celery:
    """A Celery app that has none of this project's code in it."""
    app = Celery("elsewhere", broker=url, backend=url, set_as_current=False)
    app.conf.task_default_queue = "elsewhere"
    return app
