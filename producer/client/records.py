"""Reading Celery's result records: a result, or the error it stands for."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import orjson
from pydantic import ValidationError

from shared import errors
from shared.contract import InferenceResult
from shared.errors import Cancelled, FleetError

POLL_SECONDS = 5.0
"""How often a request's stored record is looked up while nothing comes on the reply stream."""

_KNOWN = {name: cls for name, cls in vars(errors).items() if isinstance(cls, type) and issubclass(cls, FleetError)}


class RequestStatus(StrEnum):
    """Where a request is. A request nobody has heard of is pending too: the broker keeps no list of them."""

    PENDING = "pending"
    RETRYING = "retrying"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


_STATUS = {
    "SUCCESS": RequestStatus.SUCCEEDED,
    "FAILURE": RequestStatus.FAILED,
    "REVOKED": RequestStatus.CANCELLED,
    "RETRY": RequestStatus.RETRYING,
}

Outcome = InferenceResult | FleetError
"""What came of a request, for its caller."""


def status_of(record: dict[str, Any]) -> RequestStatus:
    """The status that a record stands for."""
    return _STATUS.get(str(record.get("status")), RequestStatus.PENDING)


def decode_record(record: bytes | str) -> dict[str, Any]:
    """Decode a record; raise :class:`FleetError` for what no worker of this fleet has written."""
    try:
        data = orjson.loads(record)
    except orjson.JSONDecodeError:
        data = None
    if not isinstance(data, dict) or not isinstance(data.get("task_id"), str):
        raise FleetError("what is stored as the request's result is not a result record")
    return data


def outcome_of(record: dict[str, Any]) -> Outcome | None:
    """What came of the request that a record tells of; ``None`` where the record is not a terminal one."""
    status = record.get("status")
    if status == "SUCCESS":
        return result_of(record.get("result"))
    if status in ("FAILURE", "REVOKED"):
        return error_of(record.get("result"), revoked=status == "REVOKED")
    return None


def result_of(data: Any) -> Outcome:
    """The result that a success record holds. One of a newer worker may have fields that are not known here yet."""
    try:
        return InferenceResult.model_validate(data)
    except ValidationError:
        pass
    try:
        return InferenceResult.model_construct(**data)
    except TypeError:
        return FleetError("the result is not one of an inference request")


def error_of(data: Any, *, revoked: bool = False) -> FleetError:
    """The error a failure record stands for; one of another project becomes a :class:`FleetError` that names it."""
    if not isinstance(data, dict):
        return Cancelled() if revoked else FleetError("the request failed")
    name = str(data.get("exc_type", ""))
    message = data.get("exc_message")
    text = str(message[0]) if isinstance(message, list) and message else str(message or "")
    cls = _KNOWN.get(name)
    if cls is not None:
        return cls(text)
    return Cancelled() if revoked else FleetError(f"{name}: {text}")
