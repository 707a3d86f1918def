"""From what a caller gives to what is submitted: a checked request, with the headers that its message is to have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shared.contract import LATEST, InferenceRequest
from shared.errors import BadRequest
from shared.headers import check_headers
from shared.identity import LONGEST_ID, id_in_fleet
from shared.wire import address_of

RequestLike = InferenceRequest | Mapping[str, Any]
"""A request as its caller gives it: a value, or a mapping of its fields."""

HeadersOf = Callable[[InferenceRequest], Mapping[str, str]]
"""Makes the further headers of a request's message, a trace context for example."""


@dataclass(frozen=True, slots=True)
class Submission:
    """A checked request, and the further headers of its message."""

    request: InferenceRequest
    headers: Mapping[str, str] = field(default_factory=dict)


def prepare(request: RequestLike, deadline: float | None, headers_of: HeadersOf | None = None) -> Submission:
    """Check a request; ``deadline`` is its deadline where it has none of its own.

    Raises :class:`~shared.errors.BadRequest` where the request, or what ``headers_of`` makes of it, is not valid.
    """
    if not isinstance(request, InferenceRequest):
        if not isinstance(request, Mapping):
            raise BadRequest(f"a request is an InferenceRequest or a mapping of its fields, not {_named(request)}")
        if deadline is not None and request.get("deadline") is None:
            request = {**request, "deadline": deadline}
        request = InferenceRequest.parse(request)
    elif deadline is not None and request.deadline is None:
        request = request.model_copy(update={"deadline": deadline})
    request_id = id_in_fleet(request.id, request.tenant)
    if request_id != request.id:
        if len(request_id) > LONGEST_ID:
            raise BadRequest(f"id: has more than {LONGEST_ID} characters with the tenant's name in front")
        request = request.model_copy(update={"id": request_id})
    if headers_of is None:
        return Submission(request)
    headers = dict(headers_of(request))
    check_headers(headers)
    return Submission(request, headers)


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
