"""What a client does, apart from how it waits.

What has to ask the broker, or to wait, is written once, as a generator: it yields what it wants done and is sent what
came of it, or has the error thrown in. The client carries out these steps by blocking its thread
(:mod:`producer.client.blocking`), the asyncio client by awaiting (:mod:`producer.client.awaiting`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import redis

from shared.direct import Script

T = TypeVar("T")


class AnyFuture(Protocol):
    """What a future of the standard library and one of asyncio have in common."""

    def done(self) -> bool:
        """Whether it has its result, or was cancelled."""

    def cancelled(self) -> bool:
        """Whether it was cancelled."""

    def result(self) -> Any:
        """The result of one that is done."""

    def set_result(self, result: Any, /) -> None:
        """Resolve it."""

    def set_exception(self, exception: BaseException, /) -> None:
        """Let it fail."""

    def exception(self) -> BaseException | None:
        """The error of one that is done."""


@dataclass(frozen=True, slots=True)
class Command:
    """Send a command to the broker; its answer is sent back. What the client library raises is thrown in."""

    words: tuple[str | bytes | float, ...]


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait for so many seconds. A client that is closed meanwhile throws :class:`~shared.errors.ClientClosed` in."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait until a future is done, for so many seconds at the most; sent back is whether it is.

    With ``other``, no longer than until that is done. Only the asyncio client waits for two.
    """

    future: AnyFuture
    seconds: float
    other: AnyFuture | None = None


@dataclass(frozen=True, slots=True)
class Work:
    """Call a function that may block for a moment, and send back what it returns."""

    function: Callable[[], Any]


Step = Command | Pause | Wait | Work
Steps = Generator[Step, Any, T]


def run_script(script: Script, keys: Sequence[str], args: Sequence[str | bytes | float]) -> Steps[Any]:
    """Run a script: by its name, or in full where the broker does not know it."""
    try:
        return (yield Command(script.by_name(keys, args)))
    except redis.exceptions.NoScriptError:
        return (yield Command(script.in_full(keys, args)))


class Course(Generic[T]):
    """Steps that are being carried out: whoever does it takes the next step, and sets what came of it."""

    def __init__(self, steps: Steps[T]) -> None:
        self._steps = steps
        self.answer: Any = None
        self.error: BaseException | None = None
        self.value: T

    def next(self) -> Step | None:
        """The next step; ``None`` after the last: then what they return is the ``value``. Raises what they raise."""
        answer, error = self.answer, self.error
        self.answer = self.error = None
        try:
            return self._steps.send(answer) if error is None else self._steps.throw(error)
        except StopIteration as end:
            self.value = end.value
            return None
