"""What a broker that fails raises."""

from __future__ import annotations

import redis
from kombu.exceptions import OperationalError

BROKER_ERRORS = (redis.RedisError, OperationalError, OSError)
"""By way of the client library, of Celery, or of the socket."""


def refused(error: BaseException) -> bool:
    """Whether the broker is there and would refuse the same again: no permission, or a key of another type."""
    cause: BaseException | None = error
    if isinstance(error, OperationalError):  # Celery's word for what the client library said
        cause = error.__cause__ or error.__context__
    if isinstance(cause, redis.exceptions.NoPermissionError):
        return True
    return isinstance(cause, redis.ResponseError) and str(cause).startswith("WRONGTYPE")
