"""Where the broker is: what ``fleet.redis_url`` says, in any of the ways in which Celery and redis-py write it.

- ``redis://[user:password@]host[:port][/database]``: a host; ``rediss://`` with TLS.
- ``unix:///path/to/socket[?db=N]`` or ``redis+socket:///path/to/socket[?virtual_host=N]``: a socket on this machine.
- ``sentinel://[user:password@]host[:port][,host...][/database]?master_name=NAME``: whoever the sentinels say is the
  master. Several may also be written as Celery does, ``sentinel://host;sentinel://host``. User and password are the
  broker's; those of the sentinels are ``sentinel_username=`` and ``sentinel_password=``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from shared.errors import ConfigurationError
from shared.masking import masked_url

SENTINEL, SOCKETS = "sentinel", ("unix", "redis+socket")
SCHEMES: Final = ("redis", "rediss", *SOCKETS, SENTINEL)
PATTERN: Final = r"^(redis|rediss|unix|redis\+socket|sentinel)://"
SENTINEL_PORT: Final = 26379
ALLOWED: Final = (
    "redis://[user:password@]host[:port][/database], rediss://, unix:///path[?db=N] or "
    "sentinel://host[:port][,host...][/database]?master_name=NAME, with special characters in the password escaped"
)

_DATABASE = ("db", "virtual_host")
_OF_SENTINELS = ("master_name", "sentinel_username", "sentinel_password", "min_other_sentinels")


@dataclass(frozen=True, slots=True)
class BrokerUrl:
    """A URL that was read. ``hosts`` are sentinels where ``master`` names what they watch.

    ``options`` is what else the URL says, for the client library.
    """

    scheme: str
    database: int = 0
    hosts: tuple[tuple[str, int], ...] = ()
    path: str = ""
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    master: str = ""
    sentinel_user: str | None = None
    sentinel_password: str | None = field(default=None, repr=False)
    min_other_sentinels: int = 0
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_socket(self) -> bool:
        """Whether the broker is reached through a socket of this machine."""
        return bool(self.path)

    @property
    def is_local(self) -> bool:
        """Whether what is sent to it stays on this machine."""
        return self.is_socket or all(host in ("localhost", "127.0.0.1", "::1") for host, _ in self.hosts)


def read_url(url: str) -> BrokerUrl:
    """What the URL says. Raises :class:`ConfigurationError`, without the password, where it cannot be read."""
    start = f"fleet.redis_url: {masked_url(url)!r} cannot be read"
    try:
        return _read(url)
    except _Wrong as error:
        raise ConfigurationError(f"{start}: {error}") from None
    except ValueError:
        # What it says may hold a part of the password: an unescaped one is the usual reason.
        raise ConfigurationError(f"{start} as a URL; allowed: {ALLOWED}") from None


class _Wrong(ValueError):
    """Says what is wrong in words that may be shown."""


def _read(url: str) -> BrokerUrl:
    first, *others = [urlsplit(part) for part in url.split(";")] if url.startswith(SENTINEL) else [urlsplit(url)]
    scheme = first.scheme
    if scheme not in SCHEMES or "@" in first.path + first.query + first.fragment:
        raise ValueError
    options = dict(parse_qsl((others[-1] if others else first).query or first.query, keep_blank_values=True))
    path = unquote(first.path)
    user, password = (unquote(part) if part else None for part in (first.username, first.password))
    said = [options.pop(name) for name in _DATABASE if name in options]
    if scheme in SOCKETS:
        if not path.strip("/") or (first.hostname and "@" not in first.netloc):
            raise _Wrong("a socket is named by its whole path, after three slashes: unix:///path/to/socket")
        return BrokerUrl(scheme, _database(said), (), path, user, password, options=options)
    if path.strip("/"):
        said.append(path.strip("/"))
    if scheme != SENTINEL:
        return BrokerUrl(scheme, _database(said), _hosts(first, 6379), "", user, password, options=options)
    hosts = tuple(host for part in (first, *others) for host in _hosts(part, SENTINEL_PORT))
    if others and not said:
        said = [part for other in others if (part := other.path.strip("/"))][:1]
    of_sentinels = {name: options.pop(name) for name in _OF_SENTINELS if name in options}
    if not of_sentinels.get("master_name"):
        raise _Wrong("sentinels are to be told whom to name: add ?master_name=NAME, as their configuration has it")
    if options:
        raise _Wrong(f"{next(iter(options))} is not known; sentinels have {', '.join((*_OF_SENTINELS, 'db'))}")
    return BrokerUrl(
        scheme, _database(said), hosts, "", user, password, of_sentinels["master_name"],
        of_sentinels.get("sentinel_username"), of_sentinels.get("sentinel_password"),
        _number(of_sentinels.get("min_other_sentinels", "0"), "min_other_sentinels"),
    )  # fmt: skip


def _hosts(part: SplitResult, port: int) -> tuple[tuple[str, int], ...]:
    found = []
    for text in part.netloc.rpartition("@")[2].split(","):
        split = urlsplit(f"//{text}")
        try:
            found.append((split.hostname or "localhost", split.port or port))
        except ValueError:
            raise _Wrong("a port is a number from 1 to 65535") from None
    return tuple(found)


def _database(said: list[str]) -> int:
    if len(set(said)) > 1:
        raise _Wrong("it names two databases")
    return _number(said[0].strip("/"), "the database") if said else 0


def _number(text: str, what: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise _Wrong(f"{what} is a number, 0 or more")
    return int(text)
