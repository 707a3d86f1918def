"""Worker processes that start quickly: forked from a process that has imported the program already.

From the command line of ``celery worker`` on they are workers like any other. The process they are forked from is the
standard library's fork server, of which every process of the tests has its own.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from shared.settings_schema import root_schema

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([
    __name__, "tests.faults.worker", "workers.celery", "workers.hooks.transport",
    "celery.bin.celery", "celery.apps.worker", "celery.app.amqp", "celery.app.control", "celery.app.events",
    "celery.app.log", "celery.backends.redis", "celery.concurrency.solo", "celery.fixups.django", "celery.loaders.app",
    "celery.worker.autoscale", "celery.worker.components", "celery.worker.consumer.delayed_delivery",
    "onnxruntime", "workers.engines.onnx.engine", "workers.engines.pytorch.model",
])  # fmt: skip

root_schema()  # made once, here and where workers are forked, and not by each of them

_LOCK = threading.Lock()
"""Held while a process is started or asked whether it has ended: multiprocessing does not expect several threads."""

_PR_SET_PDEATHSIG = 1


class Forked:
    """A forked process, with what tests use of ``subprocess.Popen``."""

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        self.returncode: int | None = None
        self._process = _CONTEXT.Process(target=target, args=arguments)
        with _LOCK:
            self._process.start()
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """The exit status, once it has ended; negative where a signal ended it."""
        with _LOCK:
            if self.returncode is None and self._process.exitcode is not None:
                self.returncode = self._process.exitcode
                self._process.close()
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, when it has ended; raise ``subprocess.TimeoutExpired`` where it does not in time."""
        if self.poll() is None:
            wait([self._process.sentinel], timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def be_worker(arguments: Sequence[str], environ: dict[str, str], log: Path) -> None:
    """Be ``celery -A workers worker`` with these arguments until the end of this process."""
    from celery.__main__ import main as celery

    gc.freeze()  # what the process it is forked from has loaded is not looked at again by each collection
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ.clear()
    os.environ.update(environ)
    out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.argv = ["celery", "-A", "workers", "worker", *arguments]
    code = 0
    try:
        celery()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    atexit._run_exitfuncs()
    os._exit(code)
