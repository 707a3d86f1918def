"""What a client does, apart from how it waits.

What has to ask the broker, or to wait, is written once, as a generator: it yields what it wants done and is sent what
came of it, or has the error thrown in. The client carries out these steps by blocking its thread
(:mod:`producer.client.blocking`), the asyncio client by awaiting (:mod:`producer.client.awaiting`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

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
class Run:
    """The same for a script."""

    script: Script
    keys: Sequence[str]
    args: Sequence[str | bytes | float]


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


Step = Command | Run | Pause | Wait | Work
Steps = Generator[Step, Any, T]
