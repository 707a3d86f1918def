"""What clients do with requests, as steps: submit them, wait for their outcomes, ask about them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

from producer.client.awaited import Awaited, look_up
from producer.client.engine_choice import EngineChoice
from producer.client.outage import Submit, restarted, spooling, waiting
from producer.client.records import POLL_SECONDS, Outcome
from producer.client.results import StoredResults
from producer.client.spool_sender import SpoolSender
from producer.client.steps import AnyFuture, Steps, Wait
from producer.client.submission import HeadersOf, RequestLike, Submission, checked, checked_id, checked_timeout, prepare
from producer.client.submitted import Submitted
from producer.client.submitter import Submitter
from shared.broker import broker_errors
from shared.clock import BrokerClock
from shared.errors import BrokerRefused, BrokerUnavailable, DeadlineExceeded
from shared.settings import OnOutage, Settings


class Replies(Protocol):
    """What resolves futures, by a thread or on a loop."""

    stream: str
    awaited: Awaited[Any]

    def expect(self, request_ids: Sequence[str]) -> Sequence[AnyFuture]:
        """A new future for each request."""

    def add(self, submitted: Sequence[Submitted]) -> None:
        """Tell these their outcomes, too."""


class Requests:
    """Submits requests, and knows of those under way what the broker knows."""

    def __init__(self, settings: Settings, replies: Replies, headers: HeadersOf | None) -> None:
        self.clock = BrokerClock()
        self.engines = EngineChoice(settings, self.clock)
        self.results = StoredResults(settings.fleet, replies.awaited)
        self._fleet = settings.fleet
        self._replies = replies
        self._headers = headers
        self._submitter = Submitter(settings, replies.stream)
        self._push: Submit = self.send

    def outages(self, on_outage: OnOutage, sender: SpoolSender | None) -> None:
        """What submitting does from now on while the broker is away; to spool takes a sender."""
        if sender is not None:
            self._push = partial(spooling, self.send, sender)
        elif on_outage == "wait":
            back = partial(restarted, self._fleet)
            self._push = partial(waiting, self.send, back, self._fleet.silent_after_seconds, self.clock)

    # -- submitting -------------------------------------------------------------------------------------------------

    def submit(self, requests: Sequence[RequestLike | Submission], timeout: float | None) -> Steps[list[Submitted]]:
        """Submit several at once: all of them or, where one is refused, none. They may have been checked before."""
        seconds = None if timeout is None else checked_timeout(timeout)
        submissions = [prepare(request, seconds, self.clock, self._headers) for request in requests]
        submitted = [Submitted(submission.request.id, clock=self.clock) for submission in submissions]
        self._replies.add(submitted)
        try:
            yield from self._push(submissions)
        except BaseException as error:
            self._replies.awaited.forget([one.id for one in submitted], submitted)
            if isinstance(error, BrokerUnavailable):
                error.requests = tuple(submission.again(self.clock) for submission in submissions)
            raise
        for one, submission in zip(submitted, submissions, strict=True):
            one.deadline = submission.by(self.clock).request.deadline
        return submitted

    def checked(self, request: RequestLike) -> Submission:
        """The request that a caller gives; raises :class:`~shared.errors.BadRequest` where it is not a valid one."""
        return checked(request, self.clock)

    def send(self, submissions: Sequence[Submission]) -> Steps[None]:
        """Choose an engine for each and push all of them, each id once; one that has its answer gets it."""
        engines = yield from self.engines.engines_for([submission.request for submission in submissions])
        chosen = [(submission.by(self.clock), engine) for submission, engine in zip(submissions, engines, strict=True)]
        new = yield from self._submitter.submit(chosen, self.clock())
        known = [submission.request.id for submission, pushed in zip(submissions, new, strict=True) if not pushed]
        with suppress(BrokerUnavailable):  # they are looked up again, and the list is read again
            if known:
                yield from self._watch(known)
            yield from self.engines.refresh()

    # -- those under way --------------------------------------------------------------------------------------------

    def find(self, request_id: str) -> Steps[Submitted]:
        """A request that was submitted before, by this client or another."""
        found = Submitted(checked_id(request_id), clock=self.clock)
        self._replies.add([found])
        yield from self._watch([request_id])
        return found

    def _watch(self, request_ids: Sequence[str]) -> Steps[None]:
        """Look results up now and until they are there: their records go to the client that submitted the requests."""
        self._replies.awaited.watch(request_ids)
        with broker_errors(self._fleet, "look up a result"):
            yield from look_up(self._replies.awaited, request_ids)

    def future_of(self, submitted: Submitted) -> AnyFuture:
        """The future of a request that is resolved here.

        It is made anew where the one there is was cancelled, or belongs to another loop, or to the process that this
        one was forked from: there even its lock may be held by a thread that does not exist here.
        """
        awaited, future = self._replies.awaited, submitted.future
        if future is None or not awaited.has(future) or future.cancelled():
            if moved := submitted.table is not awaited:
                self._replies.add([submitted])
            (future,) = self._replies.expect([submitted.id])
            submitted.future = future
            if submitted.known is not None:
                awaited.resolve(submitted.id, submitted.known)
            elif moved:
                awaited.watch([submitted.id])
        return future

    def ready(self, submitted: Submitted, seconds: float, other: AnyFuture | None = None) -> Steps[Outcome | None]:
        """The outcome where it comes within so many seconds, and before ``other`` is done.

        What does not come by itself is not looked for.
        """
        if submitted.known is not None:
            return submitted.known
        moved = submitted.table is not self._replies.awaited
        future = self.future_of(submitted)
        if moved and not future.done():
            with suppress(BrokerUnavailable):  # it is looked up again
                yield from self._watch([submitted.id])
        outcome: Outcome | None = future.result() if (yield Wait(future, seconds, other)) else None
        return outcome

    def outcome(self, submitted: Submitted, timeout: float | None, *, through_outages: bool) -> Steps[Outcome]:
        """The outcome, as a value. Raises :class:`TimeoutError` after ``timeout`` seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            left = POLL_SECONDS if end is None else end - time.monotonic()
            patience = max(0.0, min(left, submitted.abandoned_in(), POLL_SECONDS))
            if (outcome := (yield from self.ready(submitted, patience))) is not None:
                return outcome
            if (outcome := (yield from self.look(submitted, through_outages))) is not None:
                return outcome
            if end is not None and time.monotonic() >= end and submitted.known is None:
                raise TimeoutError(f"request {submitted.id} has no result after {timeout} s")

    def look(self, submitted: Submitted, through_outages: bool) -> Steps[Outcome | None]:
        """Look for the result where it is stored; a request that nobody will answer any more has an error instead."""
        reason = "no worker has answered"
        try:
            found = yield from self.results.outcome(submitted.id)
            if found is not None or submitted.known is not None or not submitted.late():
                return found
            if not (yield from self.engines.live_workers()):
                return DeadlineExceeded("the request's deadline passed and no worker is alive")
        except BrokerUnavailable as error:
            if not through_outages or isinstance(error, BrokerRefused):
                raise
            if not submitted.late():
                return None
            reason = "the broker is away"
        submitted.wait_longer()
        passed = submitted.abandoned_in() <= 0
        return DeadlineExceeded(f"the request's deadline passed and {reason}") if passed else None
