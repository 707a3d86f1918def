"""What a broker that fails raises."""

from __future__ import annotations

import redis
from kombu.exceptions import OperationalError

BROKER_ERRORS = (redis.RedisError, OperationalError, OSError)
"""By way of the client library, of Celery, or of the socket."""
