"""How far :meth:`Client.map` is: told to a function, or drawn on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int | None], None]
"""Called with how many are done and how many there are, where that is known."""


@contextmanager
def reporting(progress: bool | Progress, total: int | None) -> Iterator[Progress]:
    """What to call after each result: the caller's own function, one that draws a bar, or one that does nothing."""
    if callable(progress):
        yield progress
    elif not progress:
        yield lambda *_: None
    else:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        columns = TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Bar(*columns, transient=True) as bar:
            task = bar.add_task("requests", total=total)
            yield lambda done, _: bar.update(task, completed=done)
