"""How much the processes of this worker have done: the processor's time that they took, the bytes that they moved."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Work:
    """What was done so far: seconds of processor time, and bytes read and written."""

    seconds: float
    moved: int


def work_done() -> Work:
    """The work of this process and of those that it has started, without that of the calling thread.

    Where the system does not say it (``/proc``), it is this process' own time alone.
    """
    own = time.thread_time()
    if not (_PROC / "self" / "stat").exists():
        return Work(time.process_time() - own, 0)
    seconds, moved = 0.0, 0
    for pid in _family(os.getpid()):
        seconds += _seconds(pid)
        moved += _moved(pid)
    return Work(seconds - own, moved)


def _family(pid: int) -> list[int]:
    """A process and all that came from it and are still there."""
    found, at = [pid], 0
    while at < len(found):
        for task in (_PROC / str(found[at]) / "task").glob("*/children"):
            found.extend(map(int, _text(task).split()))
        at += 1
    return found


def _seconds(pid: int) -> float:
    fields = _text(_PROC / str(pid) / "stat").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS if len(fields) > 12 else 0.0


def _moved(pid: int) -> int:
    lines = dict(line.split(": ", 1) for line in _text(_PROC / str(pid) / "io").splitlines() if ": " in line)
    return sum(int(lines.get(name, 0)) for name in ("rchar", "wchar", "read_bytes"))


def _text(path: Path) -> str:
    """A file of the system; empty where its process has ended, or is not ours to look at."""
    try:
        return path.read_text()
    except OSError:
        return ""
