"""What a caller holds of a submitted request."""

from __future__ import annotations

import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Protocol

from producer.client.records import POLL_SECONDS, Outcome, RequestStatus
from shared.contract import InferenceResult
from shared.errors import BrokerRefused, BrokerUnavailable, DeadlineExceeded, FleetError
from shared.registry import WorkerInfo

DEADLINE_GRACE_SECONDS = 5.0
"""How long after a request's deadline a worker may take to say that it has passed."""


class RequestClient(Protocol):
    """What a handle asks of the client that made it."""

    def status(self, request_id: str) -> RequestStatus:
        """Say where a request is."""

    def recover(self, request_id: str) -> Outcome | None:
        """Look up what came of a request; ``None`` while it has not ended."""

    def cancel(self, request_id: str) -> bool:
        """Cancel a request; ``False`` where it had ended before."""

    def fleet(self) -> list[WorkerInfo]:
        """List the live workers."""


class Handle:
    """One submitted request."""

    __slots__ = ("_client", "_grace", "deadline", "future", "id")

    def __init__(
        self, request_id: str, future: Future[Outcome], client: RequestClient, deadline: float | None = None
    ) -> None:
        self.id = request_id
        self.future = future
        self.deadline = deadline
        self._client = client
        self._grace = 0.0

    def __repr__(self) -> str:
        return f"<Handle {self.id} {'done' if self.future.done() else 'open'}>"

    def done(self) -> bool:
        """Whether the request has ended, as far as this process knows. Does not ask the broker."""
        return self.future.done()

    def status(self) -> RequestStatus:
        """Where the request is now; asks the broker unless it has ended here."""
        return self._client.status(self.id)

    def outcome(self, timeout: float | None = None, *, through_outages: bool = True) -> Outcome:
        """The result or the error, as a value. Raises :class:`TimeoutError` after ``timeout`` seconds.

        A request whose own deadline passed while no worker was there to say so ends with
        :class:`~shared.errors.DeadlineExceeded`. A broker that is away is waited for, unless ``through_outages`` is
        false: then :class:`~shared.errors.BrokerUnavailable` is raised within seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = POLL_SECONDS if deadline is None else deadline - time.monotonic()
            try:
                return self.future.result(max(0.0, min(left, self._abandoned_in(), POLL_SECONDS)))
            except FutureTimeout:
                if (found := self.look(through_outages)) is not None:
                    return found
                if deadline is not None and time.monotonic() >= deadline and not self.future.done():
                    raise TimeoutError(f"request {self.id} has no result after {timeout} s") from None

    def look(self, through_outages: bool = True) -> Outcome | None:
        """Look for the result where it is stored; a request that nobody will answer any more has an error instead."""
        reason = "no worker has answered"
        try:
            found = self._client.recover(self.id)
            if found is not None or self.future.done() or self.deadline is None or time.time() < self.deadline:
                return found
            if not self._client.fleet():
                return DeadlineExceeded("the request's deadline passed and no worker is alive")
        except BrokerUnavailable as error:
            if not through_outages or isinstance(error, BrokerRefused):
                raise
            if self.deadline is None or time.time() < self.deadline:
                return None
            reason = "the broker is away"
        self._grace = DEADLINE_GRACE_SECONDS
        return DeadlineExceeded(f"the request's deadline passed and {reason}") if self._abandoned_in() <= 0 else None

    def _abandoned_in(self) -> float:
        """Seconds until an answer is not to be expected any more."""
        return float("inf") if self.deadline is None else self.deadline + self._grace - time.time()

    def result(self, timeout: float | None = None) -> InferenceResult:
        """Wait for the result. Raises the request's error, or :class:`TimeoutError` after ``timeout`` seconds."""
        outcome = self.outcome(timeout)
        if isinstance(outcome, FleetError):
            raise outcome
        return outcome

    def cancel(self) -> bool:
        """Cancel the request; ``False`` where it had ended before."""
        return self._client.cancel(self.id)
