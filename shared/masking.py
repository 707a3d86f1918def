"""Showing configuration without showing its secrets."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

MASK = "***"

_SECRET_WORDS = frozenset(
    {"password", "passwd", "pwd", "secret", "secrets", "token", "apikey", "credential", "credentials"}
)
_SECRET_ENDINGS = ("api_key", "access_key", "private_key", "signing_key")
# Greedy up to the last "@": a password that holds an unescaped "@" is hidden whole.
_CREDENTIALS = re.compile(r"(://[^:@/]*):.*@", re.DOTALL)
_QUERY = re.compile(r"([?&]([^=&]+)=)([^&]*)")
_PATH = re.compile(r"^([a-z+]+://[^/?#]+)[/?#].+", re.DOTALL | re.IGNORECASE)


def looks_secret(name: str) -> bool:
    """Whether something of this name is likely to be a secret: ``hf_token`` is, ``max_tokens`` is not."""
    lowered = name.lower().replace("-", "_")
    return lowered.endswith(_SECRET_ENDINGS) or not _SECRET_WORDS.isdisjoint(lowered.split("_"))


def masked_url(url: str) -> str:
    """A URL without its password, in the authority or in the query. Text that is not a URL comes back as it is."""
    if "@" in url and "://" not in url:
        return f"{MASK}@{url.rpartition('@')[2]}"
    url = _CREDENTIALS.sub(rf"\1:{MASK}@", url)
    return _QUERY.sub(lambda match: match[1] + (MASK if looks_secret(match[2]) else match[3]), url)


def masked(value: Any, name: str = "") -> Any:
    """``value`` with everything secret in it replaced: by its name, by the names in it, and passwords in URLs.

    The path of a webhook is its key, so only its host is left.
    """
    if isinstance(value, Mapping):
        return {key: masked(inner, str(key)) for key, inner in value.items()}
    if value is not None and looks_secret(name):
        return MASK
    if isinstance(value, str):
        url = masked_url(value) if "://" in value or name.lower().endswith("url") else value
        return _PATH.sub(rf"\1/{MASK}", url) if "webhook" in name.lower() else url
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [masked(item, name) for item in value]
    return value
