"""Children that are forked from the test's own process, with all that it has made, as by a server that preloads."""

from __future__ import annotations

import json
import os
import select
import signal
import traceback
from collections.abc import Callable
from typing import Any

SECONDS = 60.0


class Child:
    """A forked process that calls a function; what that returns is sent back as JSON."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._pipe, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.write(write, json.dumps({"value": function()}).encode())
                status = 0
            except BaseException:
                os.write(write, json.dumps({"error": traceback.format_exc()[-30_000:]}).encode())
            finally:
                os._exit(status)
        os.close(write)

    def value(self) -> Any:
        """What the function has returned; raises :class:`AssertionError` with what it raised."""
        told = b""
        try:
            while select.select([self._pipe], [], [], SECONDS)[0] and (piece := os.read(self._pipe, 65536)):
                told += piece
        finally:
            os.close(self._pipe)
            if not told:
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        answer = json.loads(told or b'{"error": "the child hung or died"}')
        if "error" in answer:
            raise AssertionError(answer["error"])
        return answer["value"]
