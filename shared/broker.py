"""Connections to the broker, with a time limit on everything."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import resources
from typing import Any

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncioRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from shared.errors import BrokerFull, BrokerRefused, BrokerUnavailable, ConfigurationError
from shared.masking import masked_url
from shared.tls import BrokerTerms, plain_url, tls_options, unchecked

INCLUDE = "--!include "

logger = logging.getLogger(__name__)


def connect(fleet: BrokerTerms, *, socket_timeout: float | None = None) -> redis.Redis:
    """A client of the fleet's broker. Nothing is sent yet; commands fail within the configured time limits.

    Commands are not retried by the client library: whoever sends one knows whether it may be sent twice.
    Raises :class:`ConfigurationError` for a URL that cannot be read.
    """
    limit = fleet.socket_timeout_seconds if socket_timeout is None else socket_timeout
    client: redis.Redis = _from_url(redis.Redis, fleet, socket_timeout=limit, retry=Retry(NoBackoff(), 0))
    pool = client.connection_pool
    pool.connection_class = _telling(pool.connection_class)
    return client


def connect_asyncio(fleet: BrokerTerms) -> redis.asyncio.Redis:
    """The same for asyncio. Who reads from its connections limits the time that it takes."""
    client: redis.asyncio.Redis = _from_url(
        redis.asyncio.Redis, fleet, socket_timeout=None, retry=AsyncioRetry(NoBackoff(), 0)
    )
    return client


def _from_url(client_class: Any, fleet: BrokerTerms, **options: Any) -> Any:
    if unchecked(fleet):
        logger.warning("the broker's certificate is not checked (fleet.tls_verify): whoever answers is believed")
    try:
        return client_class.from_url(
            plain_url(fleet.redis_url),
            socket_connect_timeout=fleet.connect_timeout_seconds,
            socket_keepalive=True,
            health_check_interval=0,
            protocol=2,
            **options,
            **tls_options(fleet),
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


class _Telling:
    """Makes a connection say of a failure that nothing was sent, and leave a server that has become a replica."""

    def connect_check_health(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().connect_check_health(*args, **kwargs)  # type: ignore[misc]
        except (redis.RedisError, OSError) as error:
            error.unsent = True  # type: ignore[union-attr]
            raise

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().read_response(*args, **kwargs)  # type: ignore[misc]
        except redis.ReadOnlyError:
            # After a failover the name leads elsewhere, but a connection that works would stay for good.
            self.disconnect()  # type: ignore[attr-defined]
            raise


@cache
def _telling(connection_class: type) -> type:
    return type(connection_class.__name__, (_Telling, connection_class), {})


REFUSALS: Mapping[str, tuple[type[BrokerUnavailable], str]] = {
    "OOM": (BrokerFull, "is out of memory; raise its maxmemory, or let the workers empty the queues"),
    "READONLY": (
        BrokerUnavailable,
        "is a read-only replica: a failover is under way, or REDIS_URL names the wrong node",
    ),
    "MASTERDOWN": (BrokerUnavailable, "is a replica that has lost its master"),
    "LOADING": (BrokerUnavailable, "is still loading its data"),
    "MISCONF": (BrokerUnavailable, "cannot write its data to its disk; make room there"),
    "NOREPLICAS": (BrokerUnavailable, "has too few replicas to take anything"),
    "BUSY": (BrokerUnavailable, "is busy with a script"),
    "NOAUTH": (BrokerRefused, "wants a password; put it into REDIS_URL (redis://user:password@host:port/database)"),
    "WRONGPASS": (BrokerRefused, "does not accept the user and password in REDIS_URL"),
    "NOPERM": (BrokerRefused, "does not permit this to the user in REDIS_URL"),
    "ACL failure": (BrokerRefused, "does not permit this to the user in REDIS_URL"),  # within a script
}
"""What a broker answers in place of doing what it is asked."""

_CODE = re.compile(rf"\b({'|'.join(REFUSALS)})\b")


@contextmanager
def broker_errors(fleet: BrokerTerms, doing: str) -> Iterator[None]:
    """Turn the client library's errors into one that says what failed and what to do."""
    try:
        yield
    except (redis.RedisError, OSError) as error:
        raise unavailable(error, fleet.redis_url, doing) from error


def unavailable(error: Exception, url: str, doing: str) -> BrokerUnavailable:
    """The client library's error as one of ours. It never holds a secret."""
    start = f"cannot {doing}: the broker at {masked_url(url)}"
    # A script's error has the code of the command that failed somewhere in its text.
    found = _CODE.search(f"{getattr(error, 'status_code', '')} {error}")
    if found is not None:
        kind, text = REFUSALS[found[0]]
        return kind(f"{start} {text} ({found[0]})")
    if not isinstance(error, redis.ConnectionError | redis.TimeoutError | OSError):
        return BrokerRefused(f"{start} refuses: {error}")
    answer = BrokerUnavailable(f"{start} does not answer ({error}). Is it running, and is REDIS_URL right?")
    answer.outcome_unknown = not getattr(error, "unsent", False)
    return answer


def lua(package: str, name: str) -> str:
    """A Lua script in the ``lua`` folder of ``package``; ``--!include NAME`` on top stands for one of ``shared``."""
    text = resources.files(package).joinpath("lua", f"{name}.lua").read_text(encoding="utf-8")
    first, _, rest = text.partition("\n")
    return lua("shared", first.removeprefix(INCLUDE)) + rest if first.startswith(INCLUDE) else text
