"""Carrying out steps by blocking the thread that asks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, ClassVar, TypeVar

import redis

from producer.client.steps import Command, Course, Pause, Steps, Wait, Work
from shared.direct import DirectConnections
from shared.errors import ClientClosed

T = TypeVar("T")


class Blocking:
    """Carries out steps with the connections of ``client``. Safe to use from several threads."""

    def __init__(self, client: redis.Redis) -> None:
        self._connections = DirectConnections(client)
        self._closed = threading.Event()

    def run(self, steps: Steps[T]) -> T:
        """Carry out the steps, and return what they return."""
        course = Course(steps)
        while (step := course.next()) is not None:
            try:
                course.answer = self._DO[type(step)](self, step)
            except BaseException as raised:  # noqa: BLE001  # whatever it is, the steps hear of it, and raise it
                course.error = raised
        return course.value

    def close(self) -> None:
        """Let those who pause go, with :class:`~shared.errors.ClientClosed`."""
        self._closed.set()
        self._connections.close()

    def _command(self, step: Command) -> Any:
        self._check()
        return self._connections.command(*step.words)

    def _pause(self, step: Pause) -> None:
        self._closed.wait(step.seconds)
        self._check()

    def _check(self) -> None:
        if self._closed.is_set():
            raise ClientClosed

    def _wait(self, step: Wait) -> bool:
        try:
            step.future.result(step.seconds)  # type: ignore[call-arg]
        except FutureTimeout:
            return step.future.done()
        return True

    def _work(self, step: Work) -> Any:
        return step.function()

    _DO: ClassVar[Mapping[type, Callable[..., Any]]] = {
        Command: _command, Pause: _pause, Wait: _wait, Work: _work,
    }  # fmt: skip
