"""Signed messages: who has the key may submit, and nobody else can change what is asked for.

The signature is HMAC-SHA256 over the compact JSON list of the headers in :data:`SIGNED` (null where one is missing) and
the reply stream, a newline, and the body as it stands in the message. What workers amend on the way (hops, deliveries,
retries) is not part of it, so it holds over redeliveries, hops and replays. It travels as hexadecimal digits in our own
header.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from typing import Any, Final

import orjson
from pydantic import SecretStr

from shared import wire
from shared.errors import WrongSignature

SIGNED: Final = ("id", "task", "eta", "expires", "group", "root_id", "parent_id", "ignore_result")
FIELD: Final = "signature"


class Signer:
    """Signs with the first of the keys and accepts any of them; without a key it signs nothing and accepts everything.

    ``keys`` are separated by commas: to change one, put the new key behind the old everywhere, then in front, then drop
    the old.
    """

    def __init__(self, keys: SecretStr | None) -> None:
        text = "" if keys is None else keys.get_secret_value()
        self._keys = [key.strip().encode() for key in text.split(",") if key.strip()]

    def __bool__(self) -> bool:
        return bool(self._keys)

    def sign(self, headers: Mapping[str, Any], body: str) -> dict[str, Any]:
        """Our own header with the signature in it."""
        own = wire.own_header(headers)
        return {**own, FIELD: _digest(self._keys[0], headers, body)} if self._keys else own

    def check(self, envelope: Mapping[str, Any]) -> None:
        """Raise :class:`WrongSignature` for a decoded envelope that is not signed, or not with one of the keys."""
        if not self._keys:
            return
        headers, body = envelope["headers"], envelope["body"]
        signature = wire.own_header(headers).get(FIELD)
        if signature is None:
            raise WrongSignature("the message is not signed; this fleet runs signed messages only (fleet.signing_key)")
        if not isinstance(signature, str) or not signature.isascii():
            raise WrongSignature
        if not any(hmac.compare_digest(_digest(key, headers, body), signature) for key in self._keys):
            raise WrongSignature("the message's signature is wrong: another key, or the message was changed")


def _digest(key: bytes, headers: Mapping[str, Any], body: str) -> str:
    reply = wire.own_header(headers).get("reply")
    signed = orjson.dumps([*(headers.get(name) for name in SIGNED), reply])
    return hmac.digest(key, signed + b"\n" + body.encode(), "sha256").hex()
