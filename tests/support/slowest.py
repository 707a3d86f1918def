"""Which files of the tests take the longest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

SHOWN = 10


def slowest_files(stats: Mapping[str, Iterable[Any]]) -> list[str]:
    """A line each for the files in which most seconds were spent, fixtures included; none where few files ran.

    Args:
        stats: the terminal reporter's reports by outcome.
    """
    seconds: Counter[str] = Counter()
    for reports in stats.values():
        for report in reports:
            if hasattr(report, "duration"):
                seconds[report.nodeid.partition("::")[0]] += report.duration
    if len(seconds) <= SHOWN:
        return []
    total = sum(seconds.values())
    lines = [f"{spent:8.1f} s  {spent / total:4.0%}  {name}" for name, spent in seconds.most_common(SHOWN)]
    return [*lines, f"{total:8.1f} s        all {len(seconds)} files, one after the other"]
