"""Connections to the broker, with a time limit on everything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from shared.errors import BrokerUnavailable, ConfigurationError
from shared.masking import masked_url
from shared.settings import FleetSettings


def connect(fleet: FleetSettings, *, socket_timeout: float | None = None) -> redis.Redis:
    """A client of the fleet's broker. Nothing is sent yet; commands fail within the configured time limits.

    Commands are not retried by the client library: whoever sends one knows whether it may be sent twice.
    Raises :class:`ConfigurationError` for a URL that cannot be read.
    """
    try:
        return redis.Redis.from_url(
            fleet.redis_url,
            socket_connect_timeout=fleet.connect_timeout_seconds,
            socket_timeout=socket_timeout if socket_timeout is not None else fleet.socket_timeout_seconds,
            socket_keepalive=True,
            health_check_interval=0,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
        )
    except ValueError:
        # What it says may hold a part of the password: an unescaped one is the usual reason.
        raise ConfigurationError(
            f"fleet.redis_url: {masked_url(fleet.redis_url)!r} cannot be read as a URL; allowed: "
            "redis://[user:password@]host[:port][/database], with special characters in the password escaped"
        ) from None


def hasten(client: redis.Redis, seconds: float) -> None:
    """From now on the client's commands wait no longer than this for an answer."""
    client.connection_pool.connection_kwargs["socket_timeout"] = seconds
    client.connection_pool.disconnect(inuse_connections=False)
    client.connection_pool.reset()  # its connections keep the limit that they were made with


@contextmanager
def broker_errors(fleet: FleetSettings, doing: str) -> Iterator[None]:
    """Turn the client library's connection errors into one that says what failed and what to do."""
    try:
        yield
    except (redis.ConnectionError, redis.TimeoutError, OSError) as error:
        raise BrokerUnavailable(
            f"cannot {doing}: the broker at {masked_url(fleet.redis_url)} does not answer ({error}). "
            "Is it running, and is REDIS_URL right?"
        ) from error


def lua(package: str, name: str) -> str:
    """The text of a Lua script that lies in the ``lua`` folder of ``package``."""
    return resources.files(package).joinpath("lua", f"{name}.lua").read_text(encoding="utf-8")
