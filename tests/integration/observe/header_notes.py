"""For a worker's ``--include``: notes the headers that a receiver of Celery's signals finds on each request."""

import json
import os
from pathlib import Path
from typing import Any

from celery.app.task import Task
from celery.signals import task_prerun

NOTES = "HEADER_NOTES"
"""The environment variable that names the file, one line a run."""


def _note(task_id: str, task: Task, **_: Any) -> None:
    with Path(os.environ[NOTES]).open("a", encoding="utf-8") as notes:
        notes.write(json.dumps({"id": task_id, "headers": task.request.headers}) + "\n")


task_prerun.connect(_note, weak=False)
