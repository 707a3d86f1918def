"""What workers write into a message's header is sealed: nobody else can set what they count.

The seal is an HMAC with a secret that lies in the broker, where a producer's user has no access to it. It needs no
signing key, and is there whether messages are signed or not.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Mapping
from typing import Any

import orjson

from shared import wire

FIELD = "seal"

WRITTEN = ("deliveries", "hops")
"""Of our own header: what workers write, and believe only where it is sealed."""

_WRITTEN = frozenset(WRITTEN)

FRESH_SECONDS = 5.0
"""How old the secret may be where it is used to seal, or does not fit. A broker that was emptied has another."""

UPGRADE_SECONDS = 24 * 3600.0
"""For how long after the first seal of a fleet that is believed which releases without seals have written."""


class Seal:
    """Seals and checks. For the loop and for one thread beside it.

    ``load`` asks the broker for ``<ms since the epoch when it was made>:<secret>`` and raises what a broker that fails
    raises; so does all that needs it. ``clock`` tells seconds since the epoch.
    """

    def __init__(self, load: Callable[[], bytes], clock: Callable[[], float] = time.time) -> None:
        self._load = load
        self._clock = clock
        self._asked = float("-inf")
        self._known = (0.0, b"")  # when it was made, and the secret

    def sealed(self, headers: Mapping[str, Any], **written: Any) -> dict[str, Any]:
        """What goes into our own header of a message: what a worker has ``written``, and the seal over all of it."""
        self._refresh()
        own = {**wire.own_header(headers), **written}
        return {**written, FIELD: self._digest(headers, own)}

    def check(self, envelope: Mapping[str, Any]) -> None:
        """Take out of a decoded envelope what no worker has written there."""
        headers = envelope["headers"]
        own = wire.own_header(headers)
        if _WRITTEN.isdisjoint(own) or self._holds(headers, own):
            return
        headers[wire.HEADER] = {name: value for name, value in own.items() if name not in (*WRITTEN, FIELD)}

    def _holds(self, headers: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
        seal = own.get(FIELD)
        if seal is None:
            return self._is_older(own)
        if not isinstance(seal, str) or not seal.isascii():
            return False
        if self._fits(headers, own, seal):
            return True
        return self._refresh() and self._fits(headers, own, seal)

    def _is_older(self, own: Mapping[str, Any]) -> bool:
        """Whether a release without seals may have written it: it was sent before there was one."""
        if not self._known[1]:
            self._refresh()
        sent, made = own.get("sent"), self._known[0]
        recent = self._clock() - made < UPGRADE_SECONDS
        return recent and isinstance(sent, int | float) and 0 < sent < made

    def _fits(self, headers: Mapping[str, Any], own: Mapping[str, Any], seal: str) -> bool:
        return bool(self._known[1]) and hmac.compare_digest(self._digest(headers, own), seal)

    def _digest(self, headers: Mapping[str, Any], own: Mapping[str, Any]) -> str:
        text = orjson.dumps([headers.get("id"), *(own.get(name) for name in WRITTEN)])
        return hmac.digest(self._known[1], text, "sha256").hex()

    def _refresh(self) -> bool:
        """Ask for the secret, unless that was done just before; whether it is another one now."""
        now = time.monotonic()
        if now - self._asked < FRESH_SECONDS:
            return False
        before = self._known
        made, _, secret = self._load().partition(b":")
        self._asked, self._known = now, (int(made) / 1000, secret)
        return self._known != before
