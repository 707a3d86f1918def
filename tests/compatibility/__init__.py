"""What earlier releases wrote, kept as files: a folder for each release."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import redis

FOLDER = Path(__file__).parent
RELEASES = sorted(path for path in FOLDER.iterdir() if path.is_dir() and path.name[0].isdigit())

State = dict[str, dict[str, Any]]
"""What a broker held: each key's type and value."""


def read_json(path: Path) -> Any:
    """What a file holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def restore(client: redis.Redis, state: State) -> None:
    """Let the broker hold it again, byte for byte."""
    for key, held in state.items():
        value = held["value"]
        match held["type"]:
            case "string":
                client.set(key, value)
            case "list":
                client.rpush(key, *value)
            case "hash":
                client.hset(key, mapping=value)
            case "zset":
                client.zadd(key, value)
            case "stream":
                for entry, fields in value:
                    client.xadd(key, fields, id=entry)


def records_in(state: State) -> dict[str, dict[str, Any]]:
    """The result records of a state, by the ids of their tasks."""
    prefix = "celery-task-meta-"
    return {key.removeprefix(prefix): json.loads(held["value"]) for key, held in state.items()
            if key.startswith(prefix)}  # fmt: skip
