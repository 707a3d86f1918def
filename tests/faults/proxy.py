"""A TCP proxy on loopback that misbehaves when it is told to: the network between the fleet and its broker."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from enum import Enum
from types import TracebackType
from typing import Self

CHUNK = 65536


class Mode(Enum):
    """What happens to what flows."""

    PASS = "pass"  # noqa: S105  # no password
    """It flows."""
    DELAY = "delay"
    """It flows, each piece after a pause."""
    FREEZE = "freeze"
    """Connections are accepted and held; nothing flows until the mode changes, then everything does."""
    HALF_OPEN = "half-open"
    """What is connected goes silent for good, and nobody is told; new connections pass."""
    SILENT = "silent"
    """The same, and new connections are accepted and go silent as well."""
    CUT = "cut"
    """What is connected is closed, and new connections are refused."""


class Proxy:
    """Stands before ``port`` on loopback while its block lasts. ``pause`` is of the mode DELAY, in seconds.

    New connections go to ``target``, which may be set to another port.
    """

    def __init__(self, port: int, pause: float = 0.1) -> None:
        self.target = port
        self._pause = pause
        self._mode = Mode.PASS
        self._word, self._times = b"", 0
        self._changed = threading.Condition()
        self._other: dict[socket.socket, socket.socket] = {}
        self._dead: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, name="proxy", daemon=True)

    @property
    def url(self) -> str:
        """Where clients of the broker behind it find it."""
        return f"redis://127.0.0.1:{self.port}/0"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.set(Mode.CUT)
        end(self._listener)
        self._thread.join()
        self._listener.close()

    def set(self, mode: Mode) -> None:
        """From now on this happens."""
        with self._changed:
            self._mode = mode
            if mode in (Mode.HALF_OPEN, Mode.SILENT):
                self._dead.update(self._other)
            if mode is Mode.CUT:
                for one in self._other:
                    end(one)
                self._other.clear()
                self._dead.clear()
            self._changed.notify_all()

    def lose(self, word: bytes, times: int) -> None:
        """The next so many answers with this word in them are lost, and with each its connection."""
        self._word, self._times = word, times

    @property
    def to_lose(self) -> int:
        """How many answers are still to be lost."""
        return self._times

    def _loses(self, data: bytes) -> bool:
        with self._changed:
            lost = self._times > 0 and self._word in data
            self._times -= lost
            return lost

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self.target), timeout=5)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            with self._changed:
                if self._mode is Mode.CUT:
                    near.close()
                    far.close()
                    continue
                self._other[near], self._other[far] = far, near
                if self._mode is Mode.SILENT:
                    self._dead.update((near, far))
            for source, sink, answers in ((near, far, False), (far, near, True)):
                arguments = source, sink, answers
                threading.Thread(target=self._pump, args=arguments, name="proxy-pump", daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        """Carry what comes from one end to the other, until either is closed."""
        while True:
            try:
                data = source.recv(CHUNK)
            except OSError:
                data = b""
            if answers and self._loses(data):
                data = b""
            with self._changed:
                self._changed.wait_for(lambda: self._mode is not Mode.FREEZE)
                if source in self._dead:  # the other end is never told
                    if data:
                        continue
                    return
            if self._mode is Mode.DELAY:
                time.sleep(self._pause)
            try:
                if data:
                    sink.sendall(data)
                    continue
            except OSError:
                pass
            with self._changed:
                self._other.pop(source, None)
                self._other.pop(sink, None)
            end(sink)
            end(source)
            return


def end(one: socket.socket) -> None:
    """Shut a socket down: whoever waits for it is told."""
    with suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
