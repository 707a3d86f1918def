"""What a caller holds of a submitted request."""

from __future__ import annotations

import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TYPE_CHECKING

from producer.records import Outcome, RequestStatus
from shared.contract import InferenceResult
from shared.errors import FleetError

if TYPE_CHECKING:
    from producer.client import Client

POLL_SECONDS = 5.0
"""How often the stored result is looked up while nothing comes on the reply stream."""


class Handle:
    """One submitted request."""

    __slots__ = ("_client", "future", "id")

    def __init__(self, request_id: str, future: Future[Outcome], client: Client) -> None:
        self.id = request_id
        self.future = future
        self._client = client

    def __repr__(self) -> str:
        return f"<Handle {self.id} {'done' if self.future.done() else 'open'}>"

    def done(self) -> bool:
        """Whether the request has ended, as far as this process knows. Does not ask the broker."""
        return self.future.done()

    def status(self) -> RequestStatus:
        """Where the request is now; asks the broker unless it has ended here."""
        return self._client.status(self.id)

    def outcome(self, timeout: float | None = None) -> Outcome:
        """The result or the error, as a value. Raises :class:`TimeoutError` after ``timeout`` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if deadline is None else deadline - time.monotonic()
            try:
                return self.future.result(POLL_SECONDS if left is None else max(0.0, min(left, POLL_SECONDS)))
            except FutureTimeout:
                self._client.recover(self.id)
                if deadline is not None and time.monotonic() >= deadline and not self.future.done():
                    raise TimeoutError(f"request {self.id} has no result after {timeout} s") from None

    def result(self, timeout: float | None = None) -> InferenceResult:
        """Wait for the result. Raises the request's error, or :class:`TimeoutError` after ``timeout`` seconds."""
        outcome = self.outcome(timeout)
        if isinstance(outcome, FleetError):
            raise outcome
        return outcome

    def cancel(self) -> bool:
        """Cancel the request; ``False`` where it had ended before."""
        return self._client.cancel(self.id)
