"""TLS on the way to the broker: what a ``rediss://`` URL and the settings ask for, in the client library's words."""

from __future__ import annotations

from typing import Any, Final, Protocol
from urllib.parse import parse_qsl

_NOT_CHECKED: Final = frozenset({"none", "cert_none", "optional", "cert_optional", "false", "no", "0"})
IN_URL: Final = frozenset({"ssl_cert_reqs", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname"})
"""What a URL may say about certificates."""


class BrokerTerms(Protocol):
    """Where the broker is and how long to wait for it: the fleet's settings say it."""

    @property
    def redis_url(self) -> str:
        """Its URL, with the password where it has one."""

    @property
    def connect_timeout_seconds(self) -> float:
        """Longest wait for a connection."""

    @property
    def socket_timeout_seconds(self) -> float:
        """Longest wait for an answer."""

    @property
    def tls_ca_file(self) -> str | None:
        """Authorities that may have signed its certificate."""

    @property
    def tls_cert_file(self) -> str | None:
        """Our own certificate."""

    @property
    def tls_key_file(self) -> str | None:
        """Its key."""

    @property
    def tls_verify(self) -> bool:
        """Whether the broker's certificate is checked."""


def tls_options(fleet: BrokerTerms) -> dict[str, Any]:
    """Arguments of the client library's TLS connection; empty where the URL is not ``rediss://``.

    What the URL says about certificates, in the spelling of Celery or of the client library, counts before the
    settings. The broker's certificate and its name are checked unless either says not to.
    """
    if not fleet.redis_url.startswith("rediss://"):
        return {}
    said = {name: value for name, value in parse_qsl(fleet.redis_url.partition("?")[2]) if name in IN_URL}
    checked = said.get("ssl_cert_reqs", "required").lower() not in _NOT_CHECKED and fleet.tls_verify
    options: dict[str, Any] = {
        "ssl_cert_reqs": "required" if checked else "none",
        "ssl_check_hostname": checked and said.get("ssl_check_hostname", "true").lower() not in _NOT_CHECKED,
        "ssl_ca_certs": said.get("ssl_ca_certs", fleet.tls_ca_file),
        "ssl_certfile": said.get("ssl_certfile", fleet.tls_cert_file),
        "ssl_keyfile": said.get("ssl_keyfile", fleet.tls_key_file),
    }
    return {name: value for name, value in options.items() if value is not None}


def unchecked(fleet: BrokerTerms) -> bool:
    """Whether the connection is encrypted to whoever answers: the broker's certificate is not checked."""
    return tls_options(fleet).get("ssl_cert_reqs") == "none"
