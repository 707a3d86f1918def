"""The client for asyncio: the same client, awaited. Its results come through the same reader."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, Self

from producer.client.client import Client
from producer.client.handle import Handle
from producer.client.records import POLL_SECONDS, Outcome, RequestStatus
from producer.client.submission import HeadersOf, RequestLike
from shared.contract import InferenceResult
from shared.errors import FleetError
from shared.registry import WorkerInfo
from shared.settings import OnOutage, Settings


class AsyncHandle:
    """One submitted request."""

    __slots__ = ("_handle", "id")

    def __init__(self, handle: Handle) -> None:
        self._handle = handle
        self.id = handle.id

    async def status(self) -> RequestStatus:
        """Where the request is now."""
        return await asyncio.to_thread(self._handle.status)

    async def outcome(self, timeout: float | None = None) -> Outcome:
        """The result or the error, as a value. Raises :class:`TimeoutError` after ``timeout`` seconds."""
        async with asyncio.timeout(timeout):
            future = asyncio.wrap_future(self._handle.future)
            while True:
                try:
                    return await asyncio.wait_for(asyncio.shield(future), POLL_SECONDS)
                except TimeoutError:
                    if (found := await asyncio.to_thread(self._handle.look)) is not None:
                        return found

    async def result(self, timeout: float | None = None) -> InferenceResult:
        """Wait for the result. Raises the request's error, or :class:`TimeoutError` after ``timeout`` seconds."""
        outcome = await self.outcome(timeout)
        if isinstance(outcome, FleetError):
            raise outcome
        return outcome

    async def cancel(self) -> bool:
        """Cancel the request; ``False`` where it had ended before."""
        return await asyncio.to_thread(self._handle.cancel)


class AsyncClient:
    """:class:`~producer.client.client.Client` for asyncio; the arguments and errors are the same."""

    def __init__(
        self,
        redis_url: str | None = None,
        settings: Settings | None = None,
        *,
        on_outage: OnOutage | None = None,
        headers: HeadersOf | None = None,
    ) -> None:
        self._client = Client(redis_url, settings, on_outage=on_outage, headers=headers)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop waiting for results."""
        await asyncio.to_thread(self._client.close)

    async def submit(
        self, request: RequestLike | None = None, /, *, timeout: float | None = None, **fields: Any
    ) -> AsyncHandle:
        """Submit one request."""
        return AsyncHandle(await asyncio.to_thread(self._client.submit, request, timeout=timeout, **fields))

    async def submit_many(self, requests: Sequence[RequestLike], *, timeout: float | None = None) -> list[AsyncHandle]:
        """Submit several in one round trip."""
        handles = await asyncio.to_thread(self._client.submit_many, requests, timeout=timeout)
        return [AsyncHandle(handle) for handle in handles]

    async def map(self, requests: Any, **options: Any) -> AsyncIterator[InferenceResult | FleetError]:
        """Submit many and yield their results in order, in bounded memory; the options are those of ``Client.map``."""
        results = self._client.map(requests, **options)
        try:
            while (outcome := await asyncio.to_thread(next, results, None)) is not None:
                yield outcome
        finally:
            await asyncio.to_thread(results.close)  # type: ignore[attr-defined]

    async def fleet(self) -> list[WorkerInfo]:
        """The live workers."""
        return await asyncio.to_thread(self._client.fleet)
