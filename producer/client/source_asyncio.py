"""Reading an asynchronous source of items in a task of its own, as far as somebody has room for them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable

from producer.client.steps import AnyFuture
from producer.client.window import Item


class AsyncReading:
    """A source that is read as items are wanted; whoever takes them does not wait."""

    def __init__(self, items: AsyncIterable[Item]) -> None:
        self._items = aiter(items)
        self._read: deque[Item] = deque()
        self._wanted = 0
        self._task: asyncio.Task[None] | None = None
        self._arrival: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._at_end = False
        self._error: BaseException | None = None

    @property
    def ended(self) -> bool:
        """Whether all has been taken."""
        return self._at_end and not self._read and self._error is None

    @property
    def arrival(self) -> AnyFuture:
        """Is done when there is something to take, or nothing more will come."""
        return self._arrival

    def take(self, most: int) -> list[Item]:
        """What has been read, at most so many items; more is read up to this number. Raises what the source raised."""
        taken = [self._read.popleft() for _ in range(min(most, len(self._read)))]
        self._wanted = most
        if not taken and self._error is not None:
            error, self._error = self._error, None
            raise error
        if not self._at_end and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self._fill())
        if not self._read and not self._at_end and self._arrival.done():
            self._arrival = asyncio.get_running_loop().create_future()
        return taken

    async def close(self) -> None:
        """Read no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if (close := getattr(self._items, "aclose", None)) is not None:
            await close()

    async def _fill(self) -> None:
        try:
            while len(self._read) < self._wanted:
                self._read.append(await anext(self._items))
                self._arrived()
        except StopAsyncIteration:
            self._at_end = True
        except Exception as error:  # noqa: BLE001  # it is raised to whoever takes
            self._at_end, self._error = True, error
        finally:
            self._arrived()

    def _arrived(self) -> None:
        if not self._arrival.done():
            self._arrival.set_result(None)
