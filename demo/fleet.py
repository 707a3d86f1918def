"""Starts a fleet on this machine, with the very commands of the Procfile, and stops it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from producer import Client
from shared.errors import FleetError

READY_SECONDS = 180.0
STOP_SECONDS = 40.0
LOG_TAIL_LINES = 15


def procfile(path: Path = Path("Procfile")) -> dict[str, str]:
    """The commands of the Procfile by process name."""
    lines = (line.partition(":") for line in path.read_text(encoding="utf-8").splitlines() if line and line[0] != "#")
    return {name.strip(): command.strip() for name, _, command in lines}


def threads() -> dict[str, str]:
    """Half of the processors for each engine: two that each want all of them wait for each other."""
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // 2))}


class LocalFleet:
    """Processes of the fleet, each with a log file.

    Args:
        names: process names of the Procfile.
        environ: added to this process's environment.
        logs: folder for the logs.
    """

    def __init__(self, names: Iterable[str], environ: Mapping[str, str], logs: Path) -> None:
        self._commands = {name: command for name, command in procfile().items() if name in set(names)}
        # The environment that runs this: its commands come first, whether it was activated or not.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        self._environ = {**threads(), **os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", **environ}
        self._logs = logs
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        self._logs.mkdir(parents=True, exist_ok=True)
        for name, command in self._commands.items():
            with (self._logs / f"{name}.log").open("wb") as log:
                self._processes[name] = subprocess.Popen(
                    command.split(), env=self._environ, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                    start_new_session=True,
                )  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        for process in self._processes.values():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def wait_ready(self, client: Client, queues: Iterable[str]) -> None:
        """Wait until each queue has a worker that takes requests, for as long as one says that it loads.

        Raises :class:`FleetError` with the log of a process that died.
        """
        wanted = set(queues)
        deadline = time.monotonic() + READY_SECONDS
        while True:
            workers = client.fleet()
            alive = {queue for worker in workers if worker.ready for queue in worker.queues}
            if wanted <= alive:
                return
            if any(worker.loading for worker in workers):
                deadline = time.monotonic() + READY_SECONDS
            for name, process in self._processes.items():
                if process.poll() is not None:
                    raise FleetError(
                        f"the {name} process ended with {process.returncode}; its log ends:\n{self.tail(name)}"
                    )
            if time.monotonic() > deadline:
                missing = ", ".join(sorted(wanted - alive))
                raise FleetError(f"no worker for {missing} after {READY_SECONDS:.0f} s; see {self._logs}")
            time.sleep(0.1)

    def tail(self, name: str) -> str:
        """The end of a process's log."""
        text = (self._logs / f"{name}.log").read_text(errors="replace")
        return "\n".join(text.splitlines()[-LOG_TAIL_LINES:])
