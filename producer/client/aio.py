"""The client for asyncio: the same steps, awaited on the caller's loop. No thread waits for anything."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self, TypeVar

from producer.client.any_client import AnyClient, Errors
from producer.client.awaiting import Awaiting
from producer.client.handle import Held, result_in
from producer.client.progress import Progress, reporting
from producer.client.records import Outcome, RequestStatus
from producer.client.replies_asyncio import LoopReplyReader
from producer.client.requests import Requests
from producer.client.source_asyncio import AsyncReading
from producer.client.spool_file import Spool
from producer.client.spool_sender import SpoolSender
from producer.client.steps import Steps
from producer.client.submission import HeadersOf, RequestLike, Submission, one_request
from producer.client.window import Item, Reading, Window
from shared.broker import connect_asyncio
from shared.contract import InferenceResult
from shared.direct_asyncio import SharedConnection
from shared.errors import BrokerUnavailable, FleetError
from shared.registry import WorkerInfo
from shared.settings import OnOutage, Settings

T = TypeVar("T")


class AsyncHandle(Held["AsyncClient"]):
    """One submitted request. It is of use as long as its client is open."""

    __slots__ = ()

    async def status(self) -> RequestStatus:
        """Where the request is now."""
        return await self._client.status(self.id)

    async def outcome(self, timeout: float | None = None, *, through_outages: bool = True) -> Outcome:
        """The result or the error, as a value; as :meth:`Handle.outcome <producer.client.handle.Handle.outcome>`.

        Any number of tasks may wait; one that is cancelled takes nobody along.
        """
        if (outcome := self._submitted.known) is not None:
            return outcome
        submitted = self._submitted
        return await self._client._carry_out(
            lambda own: own.outcome(submitted, timeout, through_outages=through_outages)
        )

    async def result(self, timeout: float | None = None) -> InferenceResult:
        """Wait for the result. Raises the request's error, or :class:`TimeoutError` after ``timeout`` seconds."""
        return result_in(await self.outcome(timeout))

    async def cancel(self) -> bool:
        """Cancel the request; ``False`` where it had ended before."""
        return await self._client.cancel(self.id)


class AsyncClient(AnyClient["LoopSession"]):
    """:class:`~producer.client.client.Client` for asyncio; the arguments and errors are the same.

    It is used from event loops only. Each loop, and after a fork each process, has connections and a reply stream of
    its own, made when the client is first used there. Only the spool's file is written from a thread.
    """

    @staticmethod
    def _place() -> tuple[int, asyncio.AbstractEventLoop]:
        return os.getpid(), asyncio.get_running_loop()

    def _check(self) -> None:
        connect_asyncio(self.settings.fleet)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop waiting for results. Requests that are under way go on; their results stay readable by id.

        From now on every use raises :class:`~shared.errors.ClientClosed`, and so does waiting that is under way.
        """
        self._closed = True
        if (session := self._sessions.pop()) is not None:
            await session.close()

    async def _carry_out(self, steps: Callable[[Requests], Steps[T]]) -> T:
        session = self._session
        return await session.awaiting.run(steps(session.requests))

    def _new_session(self) -> LoopSession:
        self._sessions.drop(lambda session: session.loop.is_closed())
        return LoopSession(self.settings, self.on_outage, self._headers)

    # -- submit -----------------------------------------------------------------------------------------------------

    async def submit(
        self, request: RequestLike | None = None, /, *, timeout: float | None = None, **fields: Any
    ) -> AsyncHandle:
        """Submit one request."""
        return (await self.submit_many([one_request(request, fields)], timeout=timeout))[0]

    async def submit_many(self, requests: Sequence[RequestLike], *, timeout: float | None = None) -> list[AsyncHandle]:
        """Submit several in one round trip: all of them or, where one is refused, none.

        A task that is cancelled meanwhile may have submitted them.
        """
        submitted = await self._carry_out(lambda own: own.submit(requests, timeout))
        return [AsyncHandle(one, self) for one in submitted]

    def map(
        self,
        requests: Iterable[Item] | AsyncIterable[Item],
        *,
        window: int = 512,
        progress: bool | Progress = False,
        errors: Errors = "raise",
        timeout: float | None = None,
        total: int | None = None,
    ) -> Outcomes:
        """Submit many and yield their results in order, in bounded memory; the options are those of ``Client.map``.

        ``requests`` may be asynchronous. One that is not is read on the loop, and should not block. Where a result is
        waited for within a time limit that passes, asking again goes on where it was.
        """
        if total is None and isinstance(requests, Sequence):
            total = len(requests)
        source = AsyncReading(requests) if isinstance(requests, AsyncIterable) else Reading(requests)
        under_way = self._window(source, window, timeout, errors)
        return Outcomes(self, under_way, source, (progress, total), raising=errors == "raise")

    # -- requests that are under way --------------------------------------------------------------------------------

    async def handle(self, request_id: str) -> AsyncHandle:
        """The handle of a request that was submitted before, by this client or another."""
        return AsyncHandle(await self._carry_out(lambda own: own.find(request_id)), self)

    async def status(self, request_id: str) -> RequestStatus:
        """Where a request is."""
        return await self._carry_out(lambda own: own.results.status(request_id))

    async def cancel(self, request_id: str) -> bool:
        """Cancel a request: its caller gets :class:`~shared.errors.Cancelled`. ``False`` where it had ended before."""
        return await self._carry_out(lambda own: own.results.cancel(request_id))

    async def fleet(self) -> list[WorkerInfo]:
        """The live workers."""
        return await self._carry_out(lambda own: own.engines.live_workers())


class Outcomes(AsyncIterator[InferenceResult | FleetError]):
    """The outcomes of :meth:`AsyncClient.map`, in order. Close it, where it is left before its end."""

    def __init__(
        self,
        client: AsyncClient,
        window: Window,
        source: Reading | AsyncReading,
        progress: tuple[bool | Progress, int | None],
        *,
        raising: bool,
    ) -> None:
        self._client = client
        self._window = window
        self._source = source
        self._stack = ExitStack()
        self._progress = progress
        self._report: Progress | None = None
        self._raising = raising
        self._done = 0
        self._ended = False
        self._turn = asyncio.Lock()
        self._next: asyncio.Task[Outcome | None] | None = None

    async def __anext__(self) -> InferenceResult | FleetError:
        async with self._turn:
            return await self._outcome()

    async def _outcome(self) -> InferenceResult | FleetError:
        if self._ended:
            raise StopAsyncIteration
        wanted, total = self._progress
        if self._report is None:
            self._report = self._stack.enter_context(reporting(wanted, total))
        if (outcome := await self._next_outcome()) is None:
            await self.aclose()
            raise StopAsyncIteration
        if isinstance(outcome, FleetError) and self._raising:
            await self.aclose()
            raise outcome
        self._done += 1
        self._report(self._done, total)
        return outcome

    async def _next_outcome(self) -> Outcome | None:
        if self._next is None:
            if not self._client.closed and (known := self._window.known()) is not None:
                return known
            self._next = asyncio.create_task(self._client._carry_out(self._window.next))
        await asyncio.wait([self._next])  # who gives up waiting does not stop it: the next who asks has it
        task, self._next = self._next, None
        return task.result()

    async def aclose(self) -> None:
        """Submit no more. What is under way goes on."""
        self._ended = True
        self._stack.close()
        if self._next is not None:
            self._next.cancel()
            await asyncio.gather(self._next, return_exceptions=True)
        if isinstance(self._source, AsyncReading):
            await self._source.close()


class LoopSession:
    """What a client has in one event loop: its connections, its reply stream, and what it knows of the fleet."""

    def __init__(self, settings: Settings, on_outage: OnOutage, headers: HeadersOf | None) -> None:
        fleet = settings.fleet
        self.loop = asyncio.get_running_loop()
        self._connection = SharedConnection(connect_asyncio(fleet), fleet.socket_timeout_seconds)
        self.awaiting = Awaiting(self._connection)
        self.replies = LoopReplyReader(fleet, uuid.uuid4().hex, self.awaiting)
        self.requests = Requests(settings, self.replies, headers)
        self._sender: SpoolSender | None = None
        if on_outage == "spool":
            spool = Spool(Path(fleet.spool_path), fleet.spool_max_bytes)
            self._sender = SpoolSender(spool, self._send, self._answer, self.requests.clock)
            self._sender.start()
        self.requests.outages(on_outage, self._sender)

    def _send(self, submissions: Sequence[Submission]) -> None:
        """Submit, from the spool's thread."""
        try:
            sending = asyncio.run_coroutine_threadsafe(self.awaiting.run(self.requests.send(submissions)), self.loop)
        except RuntimeError as error:  # the loop is closed, and the client was not
            raise BrokerUnavailable(f"cannot submit: {error}") from error
        sending.result()

    def _answer(self, request_id: str, outcome: Outcome) -> None:
        """Resolve a request, from the spool's thread."""
        self.loop.call_soon_threadsafe(self.replies.awaited.resolve, request_id, outcome)

    async def close(self) -> None:
        """Close everything."""
        self.awaiting.close()
        if self._sender is not None:
            await asyncio.to_thread(self._sender.close)
        await self.replies.close()
        await self._connection.close()
