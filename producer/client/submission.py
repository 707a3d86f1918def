"""From what a caller gives to what is submitted: a checked request, with the headers that its message is to have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final

from shared.clock import BrokerClock
from shared.contract import DEFAULT_TENANT, LATEST, InferenceRequest
from shared.errors import BadRequest
from shared.headers import check_headers
from shared.identity import LONGEST_ID, id_in_fleet
from shared.wire import address_of

LEAST_SECONDS = 0.001
"""A deadline is not corrected by less."""

RequestLike = InferenceRequest | Mapping[str, Any]
"""A request as its caller gives it: a value, or a mapping of its fields."""

HeadersOf = Callable[[InferenceRequest], Mapping[str, str]]
"""Makes the further headers of a request's message, a trace context for example."""


NONE: Final[Mapping[str, str]] = MappingProxyType({})
"""The further headers of most messages."""


@dataclass(frozen=True, slots=True)
class Submission:
    """A checked request, and the further headers of its message.

    ``offset`` is by how much the broker's clock, by which the deadline is reckoned, was taken to be ahead of this
    process' steady clock; ``None`` where another process has made it. One that was ``tried`` may have been submitted
    already, and have ended: then that is its end.
    """

    request: InferenceRequest
    headers: Mapping[str, str] = field(default_factory=lambda: NONE)
    offset: float | None = None
    tried: bool = False

    def by(self, clock: BrokerClock) -> Submission:
        """The same, its deadline by what is known of the broker's clock now: before, it may not have been known."""
        if (deadline := self.request.deadline) is None or self.offset is None:
            return self
        if abs((offset := clock.offset) - self.offset) < LEAST_SECONDS:
            return self
        deadline = _within_bounds(deadline + offset - self.offset)
        return replace(self, request=self.request.model_copy(update={"deadline": deadline}), offset=offset)

    def again(self, clock: BrokerClock) -> InferenceRequest:
        """The request as a caller may submit it again: its id is given, its deadline by this process' clock."""
        request = self.by(clock).request
        given: dict[str, Any] = {"id": request.id}
        if request.deadline is not None:
            given["deadline"] = _within_bounds(clock.to_here(request.deadline))
        return request.model_copy(update=given)


def checked(request: RequestLike, clock: BrokerClock) -> Submission:
    """Check a request. Its own deadline is by this process' clock, that of the submission by the broker's.

    Raises :class:`~shared.errors.BadRequest` where it is not valid.
    """
    if not isinstance(request, InferenceRequest):
        if not isinstance(request, Mapping):
            raise BadRequest(f"a request is an InferenceRequest or a mapping of its fields, not {_named(request)}")
        request = InferenceRequest.parse(request)
    if request.timeout is not None or request.deadline is not None:
        times = [] if request.timeout is None else [clock() + request.timeout]
        if request.deadline is not None:
            times.append(clock.from_here(request.deadline))
        request = _until(request, min(times))
    if request.tenant != DEFAULT_TENANT and (request_id := id_in_fleet(request.id, request.tenant)) != request.id:
        if len(request_id) > LONGEST_ID:
            raise BadRequest(f"id: has more than {LONGEST_ID} characters with the tenant's name in front")
        request = request.model_copy(update={"id": request_id})
    return Submission(request, NONE, clock.offset)


def prepare(
    request: RequestLike | Submission, timeout: float | None, clock: BrokerClock, headers_of: HeadersOf | None = None
) -> Submission:
    """Check a request that was not, and make it ready to be submitted now.

    ``timeout`` is its time in seconds where it says nothing of that itself. Raises
    :class:`~shared.errors.BadRequest` where the request, or what ``headers_of`` makes of it, is not valid.
    """
    submission = request if isinstance(request, Submission) else checked(request, clock)
    if timeout is not None and submission.request.deadline is None:
        submission = replace(submission, request=_until(submission.request, clock() + timeout), offset=clock.offset)
    if headers_of is None:
        return submission
    headers = dict(headers_of(submission.request))
    check_headers(headers)
    return replace(submission, headers=headers)


def _until(request: InferenceRequest, deadline: float) -> InferenceRequest:
    return request.model_copy(update={"deadline": _within_bounds(deadline), "timeout": None})


def _within_bounds(moment: float) -> float:
    return min(LATEST, max(0.0, moment))


def _named(value: object) -> str:
    """What a value is, without the value."""
    return "nothing" if value is None else f"a value of type {type(value).__name__}"


def checked_timeout(timeout: object) -> float:
    """A time limit in seconds; raises :class:`~shared.errors.BadRequest` for what is none."""
    if not isinstance(timeout, int | float) or not abs(timeout) < LATEST:
        raise BadRequest("timeout is not a number of seconds")
    return float(timeout)


def checked_id(request_id: object) -> str:
    """The id of a request that was submitted; raises :class:`~shared.errors.BadRequest` for what can be none."""
    if not (found := address_of(request_id)):
        raise BadRequest("what is given as a request's id is not text, or is none that a request can have")
    return found


def one_request(request: RequestLike | None, fields: Mapping[str, Any]) -> RequestLike:
    """The request of a call, which gives it either as a value or as its fields."""
    if request is None:
        return fields
    if fields:
        raise TypeError("give a request or its fields, not both")
    return request
