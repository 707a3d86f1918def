"""Carrying out steps by awaiting what they ask for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, ClassVar, TypeVar

from producer.client.steps import Command, Course, Pause, Steps, Wait, Work
from shared.direct_asyncio import SharedConnection
from shared.errors import ClientClosed

T = TypeVar("T")


class Awaiting:
    """Carries out steps in an event loop; no thread waits for any of them."""

    def __init__(self, connection: SharedConnection) -> None:
        self._connection = connection
        self._closed = asyncio.Event()

    async def run(self, steps: Steps[T]) -> T:
        """Carry out the steps, and return what they return."""
        course = Course(steps)
        while (step := course.next()) is not None:
            try:
                course.answer = await self._DO[type(step)](self, step)
            except BaseException as raised:  # noqa: BLE001  # whatever it is, the steps hear of it, and raise it
                course.error = raised
        return course.value

    def close(self) -> None:
        """Let those who pause go, with :class:`~shared.errors.ClientClosed`."""
        self._closed.set()

    async def _command(self, step: Command) -> Any:
        self._check()
        return await self._connection.command(*step.words)

    async def _pause(self, step: Pause) -> None:
        try:
            async with asyncio.timeout(step.seconds):
                await self._closed.wait()
        except TimeoutError:
            return
        self._check()

    def _check(self) -> None:
        if self._closed.is_set():
            raise ClientClosed

    async def _wait(self, step: Wait) -> bool:
        future: Any = step.future
        if not future.done():
            futures: list[Any] = [future] if step.other is None else [future, step.other]
            await asyncio.wait(futures, timeout=step.seconds, return_when=asyncio.FIRST_COMPLETED)
        done: bool = future.done()
        return done

    async def _work(self, step: Work) -> Any:
        return await asyncio.to_thread(step.function)

    _DO: ClassVar[Mapping[type, Callable[..., Awaitable[Any]]]] = {
        Command: _command, Pause: _pause, Wait: _wait, Work: _work,
    }  # fmt: skip
