"""Connections to the broker, with a time limit on everything."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncioRetry
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import Sentinel

from shared.broker_url import BrokerUrl, read_url
from shared.errors import BrokerFull, BrokerRefused, BrokerUnavailable, ConfigurationError
from shared.masking import masked_url
from shared.tls import IN_URL, BrokerTerms, tls_options, unchecked

INCLUDE = "--!include "

logger = logging.getLogger(__name__)


def connect(fleet: BrokerTerms, *, socket_timeout: float | None = None) -> redis.Redis:
    """A client of the fleet's broker. Nothing is sent yet; commands fail within the configured time limits.

    Commands are not retried by the client library: whoever sends one knows whether it may be sent twice.
    Raises :class:`ConfigurationError` for a URL that cannot be read.
    """
    _warn_of_unchecked(fleet)
    return redis.Redis.from_pool(pool_of(fleet, socket_timeout=socket_timeout))


def connect_asyncio(fleet: BrokerTerms) -> redis.asyncio.Redis:
    """The same for asyncio. Who reads from its connections limits the time that it takes."""
    _warn_of_unchecked(fleet)
    classes = _Classes(
        redis.asyncio.Connection, redis.asyncio.SSLConnection, redis.asyncio.UnixDomainSocketConnection,
        _AsyncioOfSentinels, redis.asyncio.Sentinel, lambda: AsyncioRetry(NoBackoff(), 0),
    )  # fmt: skip
    client: redis.asyncio.Redis = redis.asyncio.Redis.from_pool(
        _pool(redis.asyncio.ConnectionPool, fleet, classes, None)
    )
    return client


def _warn_of_unchecked(fleet: BrokerTerms) -> None:
    if unchecked(fleet):
        logger.warning("the broker's certificate is not checked (fleet.tls_verify): whoever answers is believed")


def pool_of(fleet: BrokerTerms, *, socket_timeout: float | None = None) -> redis.ConnectionPool:
    """The same for whoever makes a client of its own: connections to the broker, wherever it is."""
    limit = socket_timeout if socket_timeout is not None else fleet.socket_timeout_seconds
    classes = _Classes(
        redis.Connection, redis.SSLConnection, redis.UnixDomainSocketConnection, _OfSentinels, Sentinel,
        lambda: Retry(NoBackoff(), 0),
    )  # fmt: skip
    pool: redis.ConnectionPool = _pool(redis.ConnectionPool, fleet, classes, limit)
    pool.connection_class = _telling(pool.connection_class)
    return pool


@dataclass(frozen=True, slots=True)
class _Classes:
    """What the client library has for one way of waiting: its kinds of connections, its sentinels and its retries."""

    plain: Any
    encrypted: Any
    socket: Any
    of_sentinels: Any
    sentinel: Any
    retry: Callable[[], Any]


def _pool(kind: Any, fleet: BrokerTerms, classes: _Classes, socket_timeout: float | None) -> Any:
    address = read_url(fleet.redis_url)
    connection_class, where = _reached(address, fleet, classes)
    parsers: Mapping[str, Callable[[str], Any]] = redis.connection.URL_QUERY_ARGUMENT_PARSERS
    further = {name: value for name, value in address.options.items() if name not in IN_URL}
    try:
        pool = kind(
            connection_class=connection_class,
            **{
                **where,
                "db": address.database,
                "username": address.user,
                "password": address.password,
                "socket_connect_timeout": fleet.connect_timeout_seconds,
                "socket_timeout": socket_timeout,
                "health_check_interval": 0,
                "retry": classes.retry(),
                "protocol": 2,
                **{name: parsers.get(name, str)(value) for name, value in further.items()},
                **tls_options(fleet),
            },
        )
        pool.connection_class(**pool.connection_kwargs)  # refuses what it does not know; nothing is sent
    except (TypeError, ValueError):
        raise ConfigurationError(
            f"fleet.redis_url: {masked_url(fleet.redis_url)!r} has options that the client library does not know, or "
            f"with values that it cannot read: {', '.join(further)}"
        ) from None
    return pool


def _reached(address: BrokerUrl, fleet: BrokerTerms, classes: _Classes) -> tuple[Any, dict[str, Any]]:
    """The kind of connection that leads there, and what it must be told."""
    if address.is_socket:
        return classes.socket, {"path": address.path}
    if address.master:
        sentinels = classes.sentinel(
            address.hosts,
            address.min_other_sentinels,
            {
                "username": address.sentinel_user,
                "password": address.sentinel_password,
                "socket_connect_timeout": fleet.connect_timeout_seconds,
                "socket_timeout": fleet.connect_timeout_seconds,
                "retry": classes.retry(),
                "protocol": 2,
            },
        )
        return classes.of_sentinels, {"sentinels": sentinels, "master": address.master, "socket_keepalive": True}
    ((host, port),) = address.hosts
    encrypted = address.scheme == "rediss"
    return (classes.encrypted if encrypted else classes.plain), {"host": host, "port": port, "socket_keepalive": True}


class _OfSentinels(redis.Connection):  # type: ignore[misc]
    """Asks the sentinels who the master is, each time it connects."""

    def __init__(self, *, sentinels: Sentinel, master: str, **options: Any) -> None:
        super().__init__(**options)
        self._sentinels = sentinels
        self._master = master

    def _connect(self) -> Any:
        self.host, self.port = self._sentinels.discover_master(self._master)
        return super()._connect()


class _AsyncioOfSentinels(redis.asyncio.Connection):  # type: ignore[misc]
    """The same for asyncio."""

    def __init__(self, *, sentinels: Any, master: str, **options: Any) -> None:
        super().__init__(**options)
        self._sentinels = sentinels
        self._master = master

    async def _connect(self) -> None:
        self.host, self.port = await self._sentinels.discover_master(self._master)
        await super()._connect()


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
def _telling(connection_class: Any) -> Any:
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
    "without any password configured": (BrokerRefused, "has no password, but REDIS_URL gives one: leave it out"),
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
