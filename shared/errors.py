"""Every error this project raises. This module imports nothing of it.

What may be done about an error is an attribute of its class: ``hops`` says whether another engine may be tried with the
same request, ``transient`` whether the same engine may be tried again after a pause, ``outage`` that the engine failed
and not the request: it may be tried again when the engine is back. The docstring of a class is its default message.
"""

from __future__ import annotations

from typing import Any


class FleetError(Exception):
    """Something in the fleet went wrong."""

    hops = False
    transient = False
    outage = False

    def __init__(self, message: str | None = None) -> None:
        text = message or (type(self).__doc__ or type(self).__name__).strip().splitlines()[0]
        if not text.isascii():  # it may quote what was sent; what is no Unicode text could not be written or logged
            text = text.encode("utf-8", "backslashreplace").decode()
        super().__init__(text)

    @property
    def message(self) -> str:
        """The text a caller is shown."""
        return str(self.args[0])


class ConfigurationError(FleetError):
    """The configuration is not valid."""


class MissingDependency(FleetError):
    """A library that this feature needs is not installed."""


class BrokerUnavailable(FleetError):
    """The broker cannot be reached.

    ``outcome_unknown`` says that the command was sent and may have been carried out. Where requests were to be
    submitted, ``requests`` are these, with their ids: submitting them again is safe whatever became of the first time.
    """

    outcome_unknown = False
    requests: tuple[Any, ...] = ()


class BrokerFull(BrokerUnavailable):
    """The broker's memory is full."""


class BrokerRefused(BrokerUnavailable):
    """The broker does not let this process do what it asks: that does not pass by itself."""


class SpoolFull(BrokerUnavailable):
    """The broker cannot be reached, and the spool is full."""


class ClientClosed(FleetError, RuntimeError):
    """The client is closed."""


class NoDeviceAvailable(FleetError):
    """The GPUs that this worker needs are not free."""


# --- the fleet is asked for too much ------------------------------------------------------------------------------


class Overloaded(FleetError):
    """The fleet takes no more of these requests now.

    ``retry_after`` is in how many seconds it may.
    """

    def __init__(self, message: str | None = None, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class QueueFull(Overloaded):
    """The queue is full."""


class QuotaExceeded(Overloaded):
    """The tenant submits more than its quota."""


# --- the caller's errors: no other engine would answer differently ------------------------------------------------


class BadRequest(FleetError):
    """The request is not valid."""


class PayloadTooLarge(BadRequest):
    """The request is larger than this fleet accepts."""


class IdConflict(BadRequest):
    """The id belongs to another request."""


class UndecodableMessage(BadRequest):
    """A message on the queue could not be decoded."""


class WrongSignature(UndecodableMessage):
    """The message's signature is wrong."""


class AnswerTooLarge(BadRequest):
    """The answer is larger than this fleet keeps."""


class UnknownModel(BadRequest):
    """No such model is declared."""


class UnsupportedKind(BadRequest):
    """The model does not serve this kind of request."""


class ContextTooLong(BadRequest):
    """The prompt does not fit the model's context."""


class NoEngineAvailable(FleetError):
    """No live worker can serve this request."""


# --- how a request can end without a result -----------------------------------------------------------------------


class DeadlineExceeded(FleetError):
    """The request's deadline passed before it was answered."""


class TimeLimitExceeded(FleetError):
    """The request ran for longer than its time limit."""


class SoftTimeLimitExceeded(FleetError):
    """The request ran for longer than its soft time limit."""


class Cancelled(FleetError):
    """The request was cancelled."""


class DeadLettered(FleetError):
    """The request was given up and put into the dead-letter queue."""


# --- the engine's errors: another engine may be tried -------------------------------------------------------------


class EngineError(FleetError):
    """The engine failed to run the request."""

    hops = True


class EngineBusy(EngineError):
    """The engine cannot take the request just now."""

    transient = True


class EngineOutOfMemory(EngineError):
    """The engine ran out of memory."""


class EngineOutage(EngineError):
    """The engine is out of service."""

    outage = True


class EngineDied(EngineOutage):
    """The engine's process died."""


class EngineLoadError(EngineOutage):
    """The engine could not load the model."""


class EngineDisagrees(EngineLoadError):
    """The engine's answers are not those of the reference."""
