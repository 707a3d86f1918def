"""Processes that an engine's library starts, and that would live on when their parent is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_SCRIPT = 'pids=; while read -r line; do pids=$line; done; test -z "$pids" || kill -9 $pids; rm -rf "$0"'


class Guard:
    """Kills processes and removes their folder of temporary files when this process ends, however it ends.

    A shell waits for the end of a pipe from here.
    """

    def __init__(self, pids: Iterable[int], folder: Path) -> None:
        self.pids = tuple(pids)
        self._shell = subprocess.Popen(  # noqa: S603  # a constant script
            ["/bin/sh", "-c", _SCRIPT, str(folder)], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        self._say(" ".join(map(str, self.pids)))

    def close(self) -> None:
        """Kill what is left of them now."""
        for pid in self.pids:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        self._say("")
        if self._shell.stdin is not None:
            self._shell.stdin.close()
        self._shell.wait()

    def _say(self, line: str) -> None:
        if self._shell.stdin is not None:
            with suppress(BrokenPipeError):
                self._shell.stdin.write(f"{line}\n".encode())
                self._shell.stdin.flush()


def children() -> set[int]:
    """The processes that this one has started with ``multiprocessing`` and that live."""
    return {process.pid for process in multiprocessing.active_children() if process.pid is not None}


def families(pids: Iterable[int]) -> set[int]:
    """These processes, and those that they started."""
    import psutil

    found = set(pids)
    for pid in tuple(found):
        with suppress(psutil.NoSuchProcess):
            found |= {process.pid for process in psutil.Process(pid).children(recursive=True)}
    return found
