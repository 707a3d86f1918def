"""Submit requests and wait for their results."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal, Self

from producer.client.dead_letters import DeadLetters
from producer.client.engine_choice import EngineChoice
from producer.client.handle import Handle
from producer.client.outage import outage_policy
from producer.client.progress import Progress, reporting
from producer.client.records import Outcome, RequestStatus
from producer.client.replies import ReplyReader
from producer.client.results import StoredResults
from producer.client.spool_file import Spool
from producer.client.spool_sender import SpoolSender
from producer.client.submission import HeadersOf, RequestLike, Submission, prepare
from producer.client.submitter import Submitter
from producer.client.window import Item, Window
from shared.broker import broker_errors, connect
from shared.contract import InferenceResult
from shared.errors import BrokerUnavailable, FleetError
from shared.queues import lengths
from shared.registry import WorkerInfo
from shared.settings import OnOutage, Settings


class Client:
    """A connection to the fleet. Safe to use from several threads; close it, or use it in a ``with`` block.

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

    def __init__(
        self,
        redis_url: str | None = None,
        settings: Settings | None = None,
        *,
        on_outage: OnOutage | None = None,
        headers: HeadersOf | None = None,
    ) -> None:
        if settings is None:
            from shared.settings_loader import load_settings

            settings = load_settings()
        if redis_url is not None:
            settings = settings.model_copy(update={"fleet": settings.fleet.model_copy(update={"redis_url": redis_url})})
        self.settings = settings
        self.id = uuid.uuid4().hex
        self.on_outage: OnOutage = on_outage or settings.fleet.on_outage
        self._headers = headers
        self._redis = connect(settings.fleet)
        self._replies = ReplyReader(settings.fleet, self.id)
        self._results = StoredResults(self._redis, settings.fleet, self._replies)
        self._engines = EngineChoice(self._redis, settings)
        self._submitter = Submitter(self._redis, settings, self._replies.stream)
        self._outages = outage_policy(self.on_outage, settings.fleet, self._send, self._replies.resolve)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop waiting for results. Requests that are under way go on; their results stay readable by id."""
        self._outages.close()
        self._replies.close()
        self._redis.close()

    # -- submit -----------------------------------------------------------------------------------------------------

    def submit(self, request: RequestLike | None = None, /, *, timeout: float | None = None, **fields: Any) -> Handle:
        """Submit one request, given as a value, a mapping or fields.

        ``timeout`` sets the request's deadline, in seconds from now. Raises :class:`~shared.errors.BadRequest` for an
        invalid one (:class:`~shared.errors.UnknownModel`, :class:`~shared.errors.UnsupportedKind`,
        :class:`~shared.errors.PayloadTooLarge`), :class:`~shared.errors.NoEngineAvailable` where no live worker can
        serve it (with a deadline it is queued all the same, and served when an engine is there in time),
        :class:`~shared.errors.QueueFull` and :class:`~shared.errors.QuotaExceeded`, which say when to try again, and
        :class:`~shared.errors.BrokerUnavailable`.
        """
        if request is None:
            request = fields
        elif fields:
            raise TypeError("give a request or its fields, not both")
        return self.submit_many([request], timeout=timeout)[0]

    def submit_many(self, requests: Sequence[RequestLike], *, timeout: float | None = None) -> list[Handle]:
        """Submit several at once: all of them or, where one is refused, none.

        An id is submitted once: again, it gives a handle of the same request, which is not run again.
        """
        deadline = None if timeout is None else time.time() + timeout
        submissions = [prepare(request, deadline, self._headers) for request in requests]
        prepared = [submission.request for submission in submissions]
        ids = [request.id for request in prepared]
        futures = self._replies.expect(ids)
        try:
            self._outages.submit(submissions)
        except FleetError as error:
            self._replies.forget(ids)
            if isinstance(error, BrokerUnavailable):
                error.requests = tuple(request.model_copy(update={"id": request.id}) for request in prepared)
            raise
        return [
            Handle(request.id, future, self, request.deadline)
            for request, future in zip(prepared, futures, strict=True)
        ]

    def _send(self, submissions: Sequence[Submission]) -> None:
        """Choose an engine for each and push all of them, each id once; one that has its answer gets it."""
        chosen = [self._engines.engine_for(submission.request) for submission in submissions]
        new = self._submitter.submit(list(zip(submissions, chosen, strict=True)), time.time())
        known = [submission.request.id for submission, pushed in zip(submissions, new, strict=True) if not pushed]
        with suppress(BrokerUnavailable):  # they are looked up again, and the list is read again
            if known:
                self._results.watch(known)
            self._engines.refresh()

    def map(
        self,
        requests: Iterable[Item],
        *,
        window: int = 512,
        progress: bool | Progress = False,
        errors: Literal["raise", "yield"] = "raise",
        timeout: float | None = None,
        total: int | None = None,
    ) -> Iterator[InferenceResult | FleetError]:
        """Submit many and yield their results in order, with at most ``window`` of them under way.

        ``requests`` is read as results are taken, so memory stays bounded whatever its length. Where a queue is full
        or a quota used up, it waits for room. An item that is a result or an error already (of a line that could not be
        read, say) is yielded in its place. With ``errors="yield"`` an error takes its result's place and the rest go
        on; with ``"raise"`` the first one is raised, and with ``on_outage="raise"`` so is the broker's absence.
        ``timeout`` is each request's, in seconds. ``progress=True`` draws a bar on the terminal; ``total`` is how many
        there will be, where ``requests`` has no length.
        """
        if total is None and isinstance(requests, Sequence):
            total = len(requests)
        under_way = Window(self.submit_many, window, timeout, patient=self.on_outage != "raise")
        with reporting(progress, total) as report:
            for done, outcome in enumerate(under_way.outcomes(requests), start=1):
                if isinstance(outcome, FleetError) and errors == "raise":
                    raise outcome
                report(done, total)
                yield outcome

    def deliver(self, spool: Spool) -> int:
        """Submit what is in a spool, the oldest first; returns how many requests went.

        Raises :class:`~shared.errors.BrokerUnavailable` where the broker is away. What no live worker can serve stays.
        """
        return SpoolSender(spool, self._send).deliver()

    # -- requests that are under way --------------------------------------------------------------------------------

    def handle(self, request_id: str) -> Handle:
        """The handle of a request that was submitted before, by this client or another."""
        (future,) = self._replies.expect([request_id])
        self._results.watch([request_id])
        return Handle(request_id, future, self)

    def status(self, request_id: str) -> RequestStatus:
        """Where a request is."""
        return self._results.status(request_id)

    def recover(self, request_id: str) -> Outcome | None:
        """Look up what came of a request, where it is stored; resolves the handle where it is there."""
        return self._results.outcome(request_id)

    def cancel(self, request_id: str) -> bool:
        """Cancel a request: its caller gets :class:`~shared.errors.Cancelled`. ``False`` where it had ended before."""
        return self._results.cancel(request_id)

    # -- the fleet --------------------------------------------------------------------------------------------------

    def fleet(self) -> list[WorkerInfo]:
        """The live workers."""
        return self._engines.live_workers()

    def dead_letters(self) -> DeadLetters:
        """The messages that were given up."""
        return DeadLetters(self._redis, self.settings.fleet)

    def queue_lengths(self) -> dict[str, int]:
        """Messages that wait, by queue; under ``dead`` the dead letters, under ``leased`` those in workers' hands."""
        with broker_errors(self.settings.fleet, "count the queues"):
            return lengths(self._redis)
