"""What a caller holds of a submitted request."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Generic, NoReturn, Protocol, TypeVar

from producer.client.records import Outcome, RequestStatus
from producer.client.submitted import Submitted
from shared.contract import InferenceResult
from shared.errors import FleetError

C = TypeVar("C")


class RequestClient(Protocol):
    """What a handle asks of the client that made it."""

    def status(self, request_id: str) -> RequestStatus:
        """Say where a request is."""

    def cancel(self, request_id: str) -> bool:
        """Cancel a request; ``False`` where it had ended before."""

    def outcome_of(self, submitted: Submitted, timeout: float | None, *, through_outages: bool) -> Outcome:
        """Wait for the outcome of a request."""

    def future_of(self, submitted: Submitted) -> Future[Outcome]:
        """The future of a request in this process."""


class Held(Generic[C]):
    """What every handle says of its request without asking anybody."""

    __slots__ = ("_client", "_submitted")

    def __init__(self, submitted: Submitted, client: C) -> None:
        self._submitted = submitted
        self._client = client

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {'done' if self.done() else 'open'}>"

    def __reduce__(self) -> NoReturn:
        not_pickled("a handle")

    @property
    def id(self) -> str:
        """The request's id."""
        return self._submitted.id

    @property
    def deadline(self) -> float | None:
        """The request's deadline by the broker's clock, in seconds since the epoch."""
        return self._submitted.deadline

    def done(self) -> bool:
        """Whether the request has ended, as far as this process knows. Does not ask the broker."""
        return self._submitted.known is not None


class Handle(Held[RequestClient]):
    """One submitted request. It is of use as long as its client is open, in its process and those forked from it."""

    __slots__ = ()

    @property
    def future(self) -> Future[Outcome]:
        """The outcome to come. It is this handle's own: whoever cancels it does so to nobody else."""
        return self._client.future_of(self._submitted)

    def status(self) -> RequestStatus:
        """Where the request is now; asks the broker unless it has ended here."""
        return self._client.status(self.id)

    def outcome(self, timeout: float | None = None, *, through_outages: bool = True) -> Outcome:
        """The result or the error, as a value. Raises :class:`TimeoutError` after ``timeout`` seconds.

        A request whose own deadline passed while no worker was there to say so ends with
        :class:`~shared.errors.DeadlineExceeded`. A broker that is away is waited for, unless ``through_outages`` is
        false: then :class:`~shared.errors.BrokerUnavailable` is raised within seconds. Raises
        :class:`~shared.errors.ClientClosed` where the client is, or is closed meanwhile.
        """
        if (outcome := self._submitted.known) is not None:
            return outcome
        return self._client.outcome_of(self._submitted, timeout, through_outages=through_outages)

    def result(self, timeout: float | None = None) -> InferenceResult:
        """Wait for the result. Raises the request's error, or :class:`TimeoutError` after ``timeout`` seconds."""
        return result_in(self.outcome(timeout))

    def cancel(self) -> bool:
        """Cancel the request; ``False`` where it had ended before."""
        return self._client.cancel(self.id)


def result_in(outcome: Outcome) -> InferenceResult:
    """The result of a request that has one; raises the error of one that has not."""
    if isinstance(outcome, FleetError):
        raise outcome
    return outcome


def not_pickled(what: str) -> NoReturn:
    """Raise :class:`TypeError` for what is bound to a client, with the way there is instead."""
    raise TypeError(
        f"{what} cannot be pickled or copied: it is bound to its client's connections. Send the request's id "
        "(handle.id), and use client.handle(id) with a client of the other process"
    )
