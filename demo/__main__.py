"""``make demo``: a broker, a worker per engine, a mixed file of real requests, and what became of them."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from demo.fleet import LocalFleet
from demo.setup import HERE, broker, write_configuration
from demo.work import Job, Report, nearest, percentile, read_inputs, report
from producer import Client
from shared.errors import FleetError
from shared.settings_loader import load_settings

RUN = Path(".muai/demo")
INPUTS = HERE / "inputs.jsonl"


def main() -> int:
    """Run the demo; 0 when every request was answered."""
    console = Console(soft_wrap=True)
    model = os.environ.get("MODEL") or None
    started = time.monotonic()
    try:
        configuration = write_configuration(RUN / "fleet.yaml", model)
        with broker(RUN / "broker") as url:
            environ = {"REDIS_URL": url, "MUAI_CONFIG": str(configuration.resolve())}
            settings = load_settings(configuration, {**os.environ, **environ})
            jobs = read_inputs(INPUTS)
            names = ("onnx", "pytorch", "control", "beat")
            with LocalFleet(names, environ, RUN / "logs") as fleet, Client(settings=settings) as client:
                console.print(f"broker {url}; starting one worker per engine (logs in {RUN / 'logs'})")
                fleet.wait_ready(client, ("onnx", "pytorch", "control"))
                console.print(f"ready after {time.monotonic() - started:.1f} s; submitting {len(jobs)} requests")
                begun = time.monotonic()
                outcomes = list(
                    client.map(
                        (job.request for job in jobs), progress=True, errors="yield", timeout=120, total=len(jobs)
                    )
                )
                seconds = time.monotonic() - begun
    except FleetError as error:
        console.print(f"[red]{error.message}[/red]", highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("stopped")
        return 130
    found = report(jobs, outcomes)
    show(console, found, seconds, judged=model is None)
    console.print(f"done in {time.monotonic() - started:.1f} s; everything that was started has stopped")
    return 1 if found.errors else 0


def show(console: Console, found: Report, seconds: float, *, judged: bool) -> None:
    """Print the tables."""
    failed: dict[str, int] = {}
    for job, _ in found.errors:
        first = str((job.request.get("engine_preference") or ["none"])[0])
        failed[first] = failed.get(first, 0) + 1
    table = Table(
        title="what each engine did: mean and largest batch; queue wait (p50) and latency in ms; tokens/s",
        title_justify="left",
    )
    for column in ("engine", "sent", "errors", "batch", "max", "queued", "p50", "p95", "p99", "tok/s"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    for name in sorted({*found.engines, *failed}):
        row = found.engines.get(name)
        if row is None:
            table.add_row(name, "0", str(failed.get(name, 0)), *["-"] * 7)
            continue
        table.add_row(
            name, str(row.requests), str(failed.get(name, 0)), f"{sum(row.batches) / row.requests:.1f}",
            str(max(row.batches)), f"{percentile(row.queued, 0.5):.0f}",
            *(f"{percentile(row.latency, share):.0f}" for share in (0.5, 0.95, 0.99)), f"{row.tokens / seconds:,.0f}",
        )  # fmt: skip
    console.print(table)
    for job, error in found.errors[:3]:
        console.print(f"[red]{job.request['kind']} request failed: {error.message}[/red]", highlight=False)
    if judged:
        for task, (good, total) in found.right.items():
            console.print(f"{task}: {good} of {total} answers right ({good / total:.0%})")
    for job, result in found.samples:
        console.print(f"{question_of(job)!r} -> {result.text!r}  ({result.engine_used}, {result.latency_ms:.0f} ms)")
    if not found.errors:
        for query, sentence, score, sensible in nearest(found.vectors):
            mark = "" if sensible else "  [yellow](not the one a person would pick)[/yellow]"
            console.print(f"{query!r} is nearest to {sentence!r} ({score:.2f}){mark}")


def question_of(job: Job) -> str:
    """The text of a generate or chat request."""
    inputs = job.request["inputs"]
    return str(inputs.get("prompt") or inputs["messages"][-1]["content"])


if __name__ == "__main__":
    sys.exit(main())
