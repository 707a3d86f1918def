"""What the leader tells the worker of the running batch: answers, tokens, and that it makes progress."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

from shared.errors import FleetError
from workers.engines.base import EngineOutput, NewTokens
from workers.engines.common.processes import error_to_json
from workers.engines.deepspeed.wire import Channel, output_to_json

TICK_SECONDS = 1.0
"""How often the worker is told that a batch makes progress when there is nothing else to tell."""
TELL_SECONDS = 0.02
"""Shortest time between two messages of tokens, but for a request's first: each wakes the worker up."""


class Report:
    """The leader's side of the connection to the worker. May be used by the threads of several micro-batches.

    Tokens are gathered from steps and micro-batches, and are always sent before the answer they belong to.
    """

    def __init__(self, worker: Channel) -> None:
        self._worker = worker
        self._lock = threading.Lock()
        self._batch = 0
        self._said_at = time.monotonic()
        self._told_at = 0.0
        self._gathered: dict[tuple[str, int], list[int]] = {}
        self._begun: set[tuple[str, int]] = set()
        """The texts of the batch whose first tokens have been gathered."""

    def begin(self, batch: int) -> None:
        """What follows is about this batch."""
        with self._lock:
            self._batch = batch
            self._gathered.clear()
            self._begun.clear()

    def emit(self, index: int, outcome: EngineOutput | FleetError) -> None:
        """The outcome of a member of the batch."""
        if isinstance(outcome, FleetError):
            self._say(index=index, error=error_to_json(outcome))
        else:
            self._say(index=index, output=output_to_json(outcome))

    def done(self) -> None:
        """The batch is through."""
        self._say(done=True)

    def failed(self, error: BaseException) -> None:
        """The batch has failed."""
        self._say(failed=error_to_json(error))

    def tell(self, made: Sequence[NewTokens]) -> None:
        """What a step has made: see :data:`workers.engines.base.OnTokens`."""
        with self._lock:
            first = False
            for new in made:
                text = (new.request_id, new.index)
                first = first or text not in self._begun
                self._begun.add(text)
                self._gathered.setdefault(text, []).extend(new.token_ids)
            if first or time.monotonic() - self._told_at >= TELL_SECONDS:
                self._send_gathered()

    def progress(self) -> None:
        """A step is done."""
        if time.monotonic() - self._said_at > TICK_SECONDS:
            self._say(tick=True)

    def _say(self, **message: Any) -> None:
        with self._lock:
            self._send_gathered()
            self._send(message)

    def _send_gathered(self) -> None:
        if self._gathered:
            self._send({"tokens": [(name, tokens, index) for (name, index), tokens in self._gathered.items()]})
            self._gathered.clear()
            self._told_at = self._said_at

    def _send(self, message: dict[str, Any]) -> None:
        self._said_at = time.monotonic()
        self._worker.send({"batch": self._batch, **message})
