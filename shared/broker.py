"""Connections to the broker, with a time limit on everything."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from typing import Protocol

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from shared.errors import BrokerUnavailable, ConfigurationError
from shared.masking import masked_url
from shared.tls import TlsTerms, plain_url, tls_options, unchecked

logger = logging.getLogger(__name__)

INCLUDE = "--!include "


class BrokerTerms(TlsTerms, Protocol):
    """Where the broker is and how long to wait for it: the fleet's settings say it."""

    @property
    def connect_timeout_seconds(self) -> float:
        """Longest wait for a connection."""

    @property
    def socket_timeout_seconds(self) -> float:
        """Longest wait for an answer."""


def connect(fleet: BrokerTerms, *, socket_timeout: float | None = None) -> redis.Redis:
    """A client of the fleet's broker. Nothing is sent yet; commands fail within the configured time limits.

    Commands are not retried by the client library: whoever sends one knows whether it may be sent twice.
    Raises :class:`ConfigurationError` for a URL that cannot be read.
    """
    if unchecked(fleet):
        logger.warning("the broker's certificate is not checked (fleet.tls_verify): whoever answers is believed")
    try:
        return redis.Redis.from_url(
            plain_url(fleet.redis_url),
            socket_connect_timeout=fleet.connect_timeout_seconds,
            socket_timeout=socket_timeout if socket_timeout is not None else fleet.socket_timeout_seconds,
            socket_keepalive=True,
            health_check_interval=0,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
            **tls_options(fleet),
        )
    except ValueError:
        # What it says may hold a part of the password: an unescaped one is the usual reason.
        raise ConfigurationError(
            f"fleet.redis_url: {masked_url(fleet.redis_url)!r} cannot be read as a URL; allowed: "
            "redis://[user:password@]host[:port][/database], with special characters in the password escaped"
        ) from None


@contextmanager
def broker_errors(fleet: BrokerTerms, doing: str) -> Iterator[None]:
    """Turn the client library's connection errors into one that says what failed and what to do."""
    try:
        yield
    except redis.exceptions.OutOfMemoryError as error:
        raise BrokerUnavailable(
            f"cannot {doing}: the broker at {masked_url(fleet.redis_url)} is full; let the workers drain it, or raise "
            "its maxmemory"
        ) from error
    except (redis.ConnectionError, redis.TimeoutError, OSError) as error:
        raise BrokerUnavailable(
            f"cannot {doing}: the broker at {masked_url(fleet.redis_url)} does not answer ({error}). "
            "Is it running, and is REDIS_URL right?"
        ) from error


def lua(package: str, name: str) -> str:
    """A Lua script in the ``lua`` folder of ``package``; ``--!include NAME`` on top stands for one of ``shared``."""
    text = resources.files(package).joinpath("lua", f"{name}.lua").read_text(encoding="utf-8")
    first, _, rest = text.partition("\n")
    return lua("shared", first.removeprefix(INCLUDE)) + rest if first.startswith(INCLUDE) else text
