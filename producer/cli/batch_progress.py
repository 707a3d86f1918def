"""How far a batch file is, on the standard error."""

from __future__ import annotations

import sys
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from producer.batch.run import Summary
from producer.batch.streams import Source

REPORT_SECONDS = 10.0
BAR_SECONDS = 0.1


class BatchProgress:
    """Progress of a batch file on the standard error: a bar on a terminal, else a line now and then.

    The bar counts bytes of ``source``: how many lines it has is not known before the end.
    """

    def __init__(self, source: Source) -> None:
        self.summary = Summary()
        self._source = source
        self._shown = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            self._bar = Progress(
                BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"), TimeElapsedColumn(),
                console=Console(stderr=True), transient=True,
            )  # fmt: skip
            self._bar.add_task("starting", total=self._source.size)
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def report(self, summary: Summary) -> None:
        """An answer was written."""
        self.summary = summary
        now = time.monotonic()
        if now - self._shown < (BAR_SECONDS if self._bar else REPORT_SECONDS):
            return
        self._shown = now
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._source.position, description=_progress(summary))
        else:
            sys.stderr.write(f"muai: {_progress(summary)}\n")


def _progress(summary: Summary) -> str:
    rate = summary.answered / summary.seconds if summary.seconds else 0.0
    return f"{summary.earlier + summary.answered} lines, {summary.failed} failed, {rate:.0f}/s"
