"""Submit requests and wait for their results."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import redis

from producer.client.any_client import AnyClient, Errors
from producer.client.blocking import Blocking
from producer.client.dead_letters import DeadLetters
from producer.client.handle import Handle, result_in
from producer.client.progress import Progress, reporting
from producer.client.records import Outcome, RequestStatus
from producer.client.replies import ReplyReader
from producer.client.requests import Requests
from producer.client.spool_file import Spool
from producer.client.spool_sender import SpoolSender
from producer.client.steps import Steps
from producer.client.submission import HeadersOf, RequestLike, one_request
from producer.client.submitted import Submitted
from producer.client.window import Item, Reading, Window
from shared.broker import broker_errors, connect
from shared.contract import InferenceResult
from shared.errors import ClientClosed, FleetError
from shared.queues import lengths
from shared.registry import WorkerInfo
from shared.settings import OnOutage, Settings
from shared.strays import Stray, stray_lists

T = TypeVar("T")


class Client(AnyClient["Session"]):
    """A connection to the fleet. Safe to use from several threads; close it, or use it in a ``with`` block.

    After a fork the child has connections, a reply stream and threads of its own, made when it first uses the client;
    what the parent has under way stays the parent's, and its handles find their results from the child as well. Closing
    it in one process closes it for that one.

    Args:
        redis_url: the broker; by default what the settings say.
        settings: by default what :func:`shared.settings_loader.load_settings` finds.
        on_outage: what submitting does while the broker is away; by default what the settings say. ``"raise"`` raises
            :class:`~shared.errors.BrokerUnavailable`, whose ``requests`` can be submitted again. ``"wait"`` tries again
            until the request's deadline (for ever, without one). ``"spool"`` keeps the request in the file
            ``fleet.spool_path``, returns its handle at once, and delivers it when the broker is back, after a crash of
            this process too: then by the next client with this spool.
        headers: called with each request when it is submitted, in the caller's thread and context; returns further
            headers for its message, such as the trace context ``{"traceparent": ...}``. Names are 1 to 64 of
            ``a-z 0-9 . _ -`` and neither Celery's nor ours, values printable ASCII, together at most 16 KiB; what
            breaks these rules raises :class:`~shared.errors.BadRequest`.
    """

    _place = staticmethod(os.getpid)

    def _check(self) -> None:
        self._sessions.get()

    def _new_session(self) -> Session:
        return Session(self.settings, self.on_outage, self._headers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop waiting for results. Requests that are under way go on; their results stay readable by id.

        From now on every use raises :class:`~shared.errors.ClientClosed`, and so does waiting that is under way.
        """
        self._closed = True
        if (session := self._sessions.pop()) is not None:
            session.close()

    @property
    def _redis(self) -> redis.Redis:
        return self._session.redis

    def _carry_out(self, steps: Callable[[Requests], Steps[T]]) -> T:
        session = self._session
        return session.blocking.run(steps(session.requests))

    # -- submit -----------------------------------------------------------------------------------------------------

    def submit(self, request: RequestLike | None = None, /, *, timeout: float | None = None, **fields: Any) -> Handle:
        """Submit one request, given as a value, a mapping or fields.

        ``timeout`` sets the request's deadline, in seconds from now; a ``deadline`` of its own is by the clock of this
        process. Raises :class:`~shared.errors.BadRequest` for an
        invalid one (:class:`~shared.errors.UnknownModel`, :class:`~shared.errors.UnsupportedKind`,
        :class:`~shared.errors.PayloadTooLarge`), :class:`~shared.errors.NoEngineAvailable` where no live worker can
        serve it (with a deadline it is queued all the same, and served when an engine is there in time),
        :class:`~shared.errors.QueueFull` and :class:`~shared.errors.QuotaExceeded`, which say when to try again,
        :class:`~shared.errors.BrokerUnavailable`, and :class:`~shared.errors.ClientClosed` after :meth:`close`.
        """
        return self.submit_many([one_request(request, fields)], timeout=timeout)[0]

    def submit_many(self, requests: Sequence[RequestLike], *, timeout: float | None = None) -> list[Handle]:
        """Submit several at once: all of them or, where one is refused, none.

        An id is submitted once: again, it gives a handle of the same request, which is not run again.
        """
        submitted = self._carry_out(lambda own: own.submit(requests, timeout))
        return [Handle(one, self) for one in submitted]

    def map(
        self,
        requests: Iterable[Item],
        *,
        window: int = 512,
        progress: bool | Progress = False,
        errors: Errors = "raise",
        timeout: float | None = None,
        total: int | None = None,
    ) -> Iterator[InferenceResult | FleetError]:
        """Submit many and yield their results in order, with at most ``window`` of them under way.

        A result is yielded as soon as it is there and those before it are. ``requests`` is read as results are taken,
        so memory stays bounded whatever its length. Where a queue is full or a quota used up, it waits for room. An
        item that is a result or an error already (of a line that could not be read, say) is yielded in its place. With
        ``errors="yield"`` an error takes its result's place and the rest go on; with ``"raise"`` the first one is
        raised, and with ``on_outage="raise"`` so is the broker's absence. ``timeout`` is each request's, in seconds.
        ``progress=True`` draws a bar on the terminal; ``total`` is how many there will be, where ``requests`` has no
        length.
        """
        under_way = self._window(Reading(requests), window, timeout, errors)
        if total is None and isinstance(requests, Sequence):
            total = len(requests)

        def outcomes() -> Iterator[InferenceResult | FleetError]:
            with reporting(progress, total) as report:
                done = 0
                while (outcome := self._next(under_way)) is not None:
                    if errors == "raise":
                        result_in(outcome)
                    done += 1
                    report(done, total)
                    yield outcome

        return outcomes()

    def _next(self, window: Window) -> Outcome | None:
        known = None if self._closed else window.known()
        return self._carry_out(window.next) if known is None else known

    def deliver(self, spool: Spool) -> int:
        """Submit what is in a spool, the oldest first; returns how many requests went.

        Raises :class:`~shared.errors.BrokerUnavailable` where the broker is away. What no live worker can serve stays.
        """
        return SpoolSender(spool, self._session.send, clock=self._session.requests.clock).deliver()

    # -- requests that are under way --------------------------------------------------------------------------------

    def handle(self, request_id: str) -> Handle:
        """The handle of a request that was submitted before, by this client or another."""
        return Handle(self._carry_out(lambda own: own.find(request_id)), self)

    def status(self, request_id: str) -> RequestStatus:
        """Where a request is."""
        return self._carry_out(lambda own: own.results.status(request_id))

    def recover(self, request_id: str) -> Outcome | None:
        """Look up what came of a request, where it is stored; resolves the handle where it is there."""
        return self._carry_out(lambda own: own.results.outcome(request_id))

    def cancel(self, request_id: str) -> bool:
        """Cancel a request: its caller gets :class:`~shared.errors.Cancelled`. ``False`` where it had ended before."""
        return self._carry_out(lambda own: own.results.cancel(request_id))

    def outcome_of(self, submitted: Submitted, timeout: float | None, *, through_outages: bool) -> Outcome:
        """Wait for the outcome of a request: what its handle does."""
        return self._carry_out(lambda own: own.outcome(submitted, timeout, through_outages=through_outages))

    def future_of(self, submitted: Submitted) -> Future[Outcome]:
        """The future of a request in this process: what its handle shows."""
        if not self._closed:
            return cast("Future[Outcome]", self._session.requests.future_of(submitted))
        if submitted.future is None:
            submitted.future = future = Future[Outcome]()
            future.set_exception(ClientClosed()) if submitted.known is None else future.set_result(submitted.known)
        return cast("Future[Outcome]", submitted.future)

    # -- the fleet --------------------------------------------------------------------------------------------------

    def fleet(self) -> list[WorkerInfo]:
        """The live workers."""
        return self._carry_out(lambda own: own.engines.live_workers())

    def dead_letters(self) -> DeadLetters:
        """The messages that were given up."""
        return DeadLetters(self._redis, self.settings.fleet)

    def stray_lists(self, most_keys: int = 200_000) -> list[Stray] | None:
        """Lists of requests that nobody reads, among so many of the broker's keys; ``None`` where we may not look."""
        with broker_errors(self.settings.fleet, "look for stray lists"):
            try:
                return list(stray_lists(self._redis, most_keys))
            except redis.exceptions.NoPermissionError:
                return None

    def queue_lengths(self) -> dict[str, int]:
        """Messages that wait, by queue; under ``dead`` the dead letters, under ``leased`` those in workers' hands."""
        client = self._redis
        with broker_errors(self.settings.fleet, "count the queues"):
            return lengths(client)


class Session:
    """What a client has in one process: its connections, its reply stream, and what it knows of the fleet."""

    def __init__(self, settings: Settings, on_outage: OnOutage, headers: HeadersOf | None) -> None:
        fleet = settings.fleet
        self.redis = connect(fleet)
        self.blocking = Blocking(self.redis)
        self.replies = ReplyReader(fleet, uuid.uuid4().hex)
        self.requests = Requests(settings, self.replies, headers)
        self._sender: SpoolSender | None = None
        if on_outage == "spool":
            spool = Spool(Path(fleet.spool_path), fleet.spool_max_bytes)
            self._sender = SpoolSender(spool, self.send, self.replies.awaited.resolve, self.requests.clock)
            self._sender.start()
        self.requests.outages(on_outage, self._sender)

    def send(self, submissions: Sequence[Any]) -> None:
        """Submit, whatever becomes of it."""
        self.blocking.run(self.requests.send(submissions))

    def close(self) -> None:
        """Close everything."""
        self.blocking.close()
        if self._sender is not None:
            self._sender.close()
        self.replies.close()
        self.blocking.close()
        self.redis.close()
