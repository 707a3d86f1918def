"""What the command line prints: tables for people, JSON for programs."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import orjson
from rich.console import Console
from rich.table import Table
from rich.text import Text

from producer.client.dead_letters import DeadLetter
from producer.client.spool_file import Spooled
from shared.contract import InferenceResult
from shared.findings import Finding, Grade
from shared.registry import EngineInfo, WorkerInfo
from shared.strays import Stray
from shared.weights import differences

PLAIN_WIDTH = 200
"""Columns where the output is no terminal: a program that reads it wants no broken lines."""
_COLOURS = {Grade.OK: "green", Grade.WARN: "yellow", Grade.FAIL: "red"}


def console() -> Console:
    """The standard output."""
    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)


def json_line(value: Any) -> str:
    """One line of JSON."""
    return orjson.dumps(value).decode()


def result_text(result: InferenceResult, *, raw: bool) -> str:
    """The text of a result; its outputs as JSON where it has none; with ``raw`` all of it."""
    if raw:
        return json_line(vars(result))
    text = result.outputs.get("text")
    return text if isinstance(text, str) else json_line(result.outputs)


def status_json(workers: Iterable[WorkerInfo], lengths: Mapping[str, int], strays: Sequence[Stray] | None = ()) -> str:
    """Workers, queues, lists that nobody reads (``null`` where that is not known) and dead letters."""
    queues = {name: count for name, count in lengths.items() if name not in ("leased", "dead")}
    return json_line(
        {
            "workers": [worker.model_dump(mode="json") for worker in workers],
            "queues": queues,
            "strays": None if strays is None else [asdict(stray) for stray in strays],
            "leased": lengths.get("leased", 0),
            "dead_letters": lengths.get("dead", 0),
        }
    )


def status_tables(
    workers: list[WorkerInfo], lengths: Mapping[str, int], strays: Sequence[Stray] | None = ()
) -> list[Table | Text]:
    """The same for people."""
    parts: list[Table | Text] = []
    if workers:
        table = _table("worker", "engine", "models (* loaded)", "batch", "in flight", "up", "heartbeat")
        for worker in workers:
            for engine in worker.engines or (None,):
                models = "-" if engine is None else _models(engine, worker.loading.get(engine.name))
                table.add_row(
                    Text(f"{worker.host}:{worker.pid}{'' if worker.ready else ' (starting)'}"),
                    Text("-" if engine is None else engine.name.value),
                    models,
                    Text("-" if engine is None else str(engine.max_batch_size)),
                    Text(str(worker.in_flight)),
                    Text(_duration(time.time() - worker.started)),
                    Text(f"{worker.age_ms / 1000:.1f} s ago"),
                )
        parts.append(table)
    else:
        parts.append(Text("no worker is alive; start one with: celery -A workers worker -Q pytorch"))
    for name, text in differences(workers).items():
        parts.append(Text(f"different weights are served under the name {name!r}: {text}", style="bold red"))
    queues = _table("queue", "waiting")
    for name, count in lengths.items():
        if name not in ("leased", "dead"):
            queues.add_row(Text(name), Text(str(count)))
    parts.append(queues)
    parts += [
        Text(f"nobody reads the list {stray.name} ({stray.messages} waiting): {stray.reason}") for stray in strays or ()
    ]
    parts.append(Text(f"in workers' hands: {lengths.get('leased', 0)}   dead letters: {lengths.get('dead', 0)}"))
    return parts


def dead_tables(letters: Sequence[DeadLetter], limit: int) -> list[Table | Text]:
    """Dead letters by reason, then the newest ``limit`` of them."""
    if not letters:
        return [Text("no dead letters")]
    reasons = _table("count", "reason")
    for reason, count in Counter(letter.reason for letter in letters).most_common():
        reasons.add_row(Text(str(count)), Text(reason))
    table = _table("letter", "request", "when", "queue", "reason")
    for letter in letters[:limit]:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(letter.time))
        table.add_row(*map(Text, (letter.id, letter.request_id or "-", when, letter.queue, letter.reason)))
    more = len(letters) - limit
    return [reasons, Text(""), table, *([Text(f"and {more} more: --limit")] if more > 0 else [])]


def spool_tables(entries: Sequence[Spooled], total: int) -> list[Table | Text]:
    """The oldest of ``total`` spooled requests."""
    if not entries:
        return [Text("the spool is empty")]
    table = _table("request", "when", "model", "kind", "bytes")
    for entry in entries:
        shown = entry.summary()
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.time))
        names = (str(shown.get("model", "-")), str(shown.get("kind", "-")))
        table.add_row(*map(Text, (entry.id, when, *names, str(shown["bytes"]))))
    more = total - len(entries)
    return [table, *([Text(f"and {more} more: --limit")] if more > 0 else [])]


def _models(engine: EngineInfo, loading: str | None) -> Text:
    names = [
        f"{name}{'*' if model.loaded else ' (loading)' if name == loading else ''}"
        for name, model in engine.models.items()
    ]
    names += [f"{name} (failed: {reason})" for name, reason in engine.failed.items() if name not in engine.models]
    return Text(", ".join(names) or "-")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column)
    return table


def _duration(seconds: float) -> str:
    whole = max(0, int(seconds))
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def finding(item: Finding) -> Text:
    """A line of the doctor's report, and under it what mends it."""
    text = Text.assemble((f"{item.grade:<5}", _COLOURS[item.grade]), f"{item.subject}: {item.detail}")
    if item.remedy:
        text.append(f"\n      -> {item.remedy}")
    return text
