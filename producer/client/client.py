"""Submit requests and wait for their results."""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from types import TracebackType
from typing import Any, Literal, Self

from producer.client.dead import DeadLetters
from producer.client.handle import Handle
from producer.client.outage import policy
from producer.client.records import Outcome, RequestStatus, read, status_of, stored
from producer.client.replies import ReplyReader
from producer.client.submitter import Submitter
from shared import keys, wire
from shared.broker import broker_errors, connect, lua
from shared.contract import EngineName, InferenceRequest, InferenceResult
from shared.errors import BrokerUnavailable, Cancelled, FleetError, NoEngineAvailable, Overloaded
from shared.queues import waiting
from shared.registry import WorkerInfo, WorkerRegistry
from shared.routing import choose, park
from shared.settings import OnOutage, Settings

REGISTRY_SECONDS, STALE_SECONDS = 1.0, 3.0
"""How old the list of live workers may be: past the first it is read again after a submission, while the answer is on
its way; past the second no engine is chosen by it."""

CHUNK = 64
"""Requests that :meth:`Client.map` submits at once."""

RequestLike = InferenceRequest | Mapping[str, Any]
Item = RequestLike | InferenceResult | FleetError
"""What :meth:`Client.map` takes: a request, or the outcome of one that needs no submitting."""
Progress = Callable[[int, int | None], None]
"""Called with how many are done and how many there are, where that is known."""


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
    """

    def __init__(
        self, redis_url: str | None = None, settings: Settings | None = None, *, on_outage: OnOutage | None = None
    ) -> None:
        if settings is None:
            from shared.settings_loader import load_settings

            settings = load_settings()
        if redis_url is not None:
            settings = settings.model_copy(update={"fleet": settings.fleet.model_copy(update={"redis_url": redis_url})})
        self.settings = settings
        self.id = uuid.uuid4().hex
        self._fleet = settings.fleet
        self._redis = connect(self._fleet)
        self._registry = WorkerRegistry(self._redis, self._fleet.silent_after_seconds)
        self._cancel = self._redis.register_script(lua("shared", "cancel"))
        self._replies = ReplyReader(self._fleet, self.id)
        self._submitter = Submitter(self._redis, settings, self._replies.stream)
        self._workers: list[WorkerInfo] = []
        self._workers_at = float("-inf")
        self._choices: dict[tuple[object, ...], EngineName] = {}
        self.on_outage: OnOutage = on_outage or self._fleet.on_outage
        self._outages = policy(self.on_outage, self._fleet, self._send, self._replies)

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
        prepared = [_prepare(request, deadline) for request in requests]
        ids = [request.id for request in prepared]
        futures = self._replies.expect(ids)
        try:
            self._outages.submit(prepared)
        except FleetError as error:
            self._replies.forget(ids)
            if isinstance(error, BrokerUnavailable):
                error.requests = tuple(request.model_copy(update={"id": request.id}) for request in prepared)
            raise
        return [
            Handle(request.id, future, self, request.deadline)
            for request, future in zip(prepared, futures, strict=True)
        ]

    def _send(self, requests: Sequence[InferenceRequest]) -> None:
        """Choose an engine for each and push all of them, each id once; one that has its answer gets it."""
        new = self._submitter.submit([(request, self._choose(request)) for request in requests], time.time())
        known = [request.id for request, pushed in zip(requests, new, strict=True) if not pushed]
        if known:
            with suppress(BrokerUnavailable):  # they are looked up again
                self._seek(known)
        if self._older_than(REGISTRY_SECONDS):
            with suppress(BrokerUnavailable):  # it is read again
                self.fleet()

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
        report, finish = _progress(progress, total)
        source = iter(requests)
        under_way: deque[Handle | Outcome] = deque()
        done = 0
        try:
            while True:
                if len(under_way) <= window - min(CHUNK, window):
                    chunk = list(islice(source, min(CHUNK, window)))
                    under_way.extend(self._submit_chunk(chunk, timeout))
                    if chunk:
                        continue
                if not under_way:
                    return
                head = under_way.popleft()
                patient = self.on_outage != "raise"
                outcome = head.outcome(through_outages=patient) if isinstance(head, Handle) else head
                if isinstance(outcome, FleetError) and errors == "raise":
                    raise outcome
                done += 1
                report(done, total)
                yield outcome
        finally:
            finish()

    def _submit_chunk(self, chunk: list[Item], timeout: float | None) -> list[Handle | Outcome]:
        requests = [item for item in chunk if not isinstance(item, InferenceResult | FleetError)]
        handles = iter(self._submit_each(requests, timeout))
        return [item if isinstance(item, InferenceResult | FleetError) else next(handles) for item in chunk]

    def _submit_each(self, chunk: list[RequestLike], timeout: float | None) -> Sequence[Handle | FleetError]:
        handles: list[Handle | FleetError] = []
        pieces = deque([chunk] if chunk else [])
        while pieces:
            piece = pieces.popleft()
            try:
                handles += self.submit_many(piece, timeout=timeout)
            except BrokerUnavailable as error:
                handles += [error] * len(piece)
            except Overloaded as error:
                # There will be room: results are on their way meanwhile. A smaller piece finds it sooner.
                time.sleep(error.retry_after)
                half = (len(piece) + 1) // 2
                pieces.extendleft(part for part in (piece[half:], piece[:half]) if part)
            except FleetError as error:
                if len(piece) == 1:
                    handles.append(error)
                else:  # one of them is bad: by themselves they say which
                    pieces.extendleft([request] for request in reversed(piece))
        return handles

    def _choose(self, request: InferenceRequest) -> EngineName:
        if self._older_than(STALE_SECONDS):
            self.fleet()
        key = (request.model, request.kind, request.engine_preference, request.features)
        engine = self._choices.get(key)
        if engine is not None:
            return engine
        try:
            engine = self._choices[key] = choose(request, self._workers, self.settings)
        except NoEngineAvailable:
            if self._older_than(REGISTRY_SECONDS):  # a worker may have come
                self.fleet()
                return self._choose(request)
            engine = park(request, self._workers, self.settings) if request.deadline is not None else None
            if engine is None:
                raise
        return engine

    def _older_than(self, seconds: float) -> bool:
        """Whether the list of live workers is."""
        return time.monotonic() - self._workers_at > seconds

    # -- requests that are under way --------------------------------------------------------------------------------

    def handle(self, request_id: str) -> Handle:
        """The handle of a request that was submitted before, by this client or another."""
        (future,) = self._replies.expect([request_id])
        self._seek([request_id])
        return Handle(request_id, future, self)

    def _seek(self, request_ids: Sequence[str]) -> None:
        with broker_errors(self._fleet, "look up a result"):
            self._replies.seek(self._redis, request_ids)

    def status(self, request_id: str) -> RequestStatus:
        """Where a request is."""
        with broker_errors(self._fleet, "ask for a status"):
            record = self._redis.get(keys.result_key(request_id))
        return RequestStatus.PENDING if record is None else status_of(stored(record))

    def recover(self, request_id: str) -> Outcome | None:
        """Look a result up where it is stored; resolves the handle where it is there."""
        with broker_errors(self._fleet, "look up a result"):
            record = self._redis.get(keys.result_key(request_id))
        if record is None:
            return None
        outcome = read(stored(record))[1]
        self._replies.fulfil(record)
        return outcome

    def cancel(self, request_id: str) -> bool:
        """Cancel a request: its caller gets :class:`~shared.errors.Cancelled`. ``False`` where it had ended before."""
        record = wire.failure_meta(request_id, Cancelled(), status="REVOKED")
        with broker_errors(self._fleet, "cancel"):
            cancelled = self._cancel(
                keys=[keys.result_key(request_id), keys.CANCELLED], args=[record, self._fleet.result_expires_seconds]
            )
        if cancelled:
            self._replies.fulfil(record)
        return bool(cancelled)

    # -- the fleet --------------------------------------------------------------------------------------------------

    def fleet(self) -> list[WorkerInfo]:
        """The live workers."""
        with broker_errors(self._fleet, "list the workers"):
            self._workers = self._registry.live()
        self._workers_at = time.monotonic()
        self._choices.clear()
        return self._workers

    def dead_letters(self) -> DeadLetters:
        """The messages that were given up."""
        return DeadLetters(self._redis, self._fleet)

    def queue_lengths(self) -> dict[str, int]:
        """Messages that wait, by queue; under ``dead`` the dead letters, under ``leased`` those in workers' hands."""
        with broker_errors(self._fleet, "count the queues"):
            lengths = waiting(self._redis, [*map(keys.queue_of, EngineName), keys.CONTROL_QUEUE])
            leased, dead = self._redis.zcard(keys.LEASE_INDEX), self._redis.xlen(keys.DEAD_LETTERS)
        return {**lengths, "leased": leased, "dead": dead}


def _prepare(request: RequestLike, deadline: float | None) -> InferenceRequest:
    if isinstance(request, InferenceRequest):
        if deadline is None or request.deadline is not None:
            return request
        return request.model_copy(update={"deadline": deadline})
    if deadline is not None and request.get("deadline") is None:
        request = {**request, "deadline": deadline}
    return InferenceRequest.parse(request)


def _progress(progress: bool | Progress, total: int | None) -> tuple[Progress, Callable[[], None]]:
    if callable(progress):
        return progress, lambda: None
    if not progress:
        return lambda *_: None, lambda: None
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    bar = Bar(TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), transient=True)
    task = bar.add_task("requests", total=total)
    bar.start()
    return lambda done, _: bar.update(task, completed=done), bar.stop
