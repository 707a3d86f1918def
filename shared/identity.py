"""What makes two requests the same one: an id, in the name space of its tenant, and the content that it stands for."""

from __future__ import annotations

import hashlib
import re
from typing import Any, Final

import orjson

from shared.contract import DEFAULT_TENANT, USUAL_PARAMS, InferenceRequest
from shared.errors import BadRequest

LONGEST_ID: Final = 128
"""Characters of an id, with its tenant in front."""

_DIGEST: Final = re.compile(r"[0-9a-f]{16}")


def id_in_fleet(request_id: str, tenant: str) -> str:
    """The id under which the fleet knows a request: that of a tenant has the tenant's name and a slash in front.

    One that has them already stays as it is, so an id may be given in either form. What it gives may be longer than
    :data:`LONGEST_ID`.
    """
    prefix = f"{tenant}/"
    return request_id if tenant == DEFAULT_TENANT or request_id.startswith(prefix) else prefix + request_id


def content_of(request: InferenceRequest) -> str:
    """The digest of what is asked: tenant, model, kind, inputs and parameters; 16 hexadecimal digits.

    What was left to its default counts as if it had been given. A field that is ``None`` does not count, so that those
    which come later leave the digests of before as they are. Raises :class:`BadRequest` for what was made past its
    validation, and cannot be written.
    """
    params = _USUAL if request.params is USUAL_PARAMS else _fields(request.params)
    asked = (request.tenant, request.model, request.kind, _fields(request.inputs), params)
    try:
        encoded = orjson.dumps(asked, default=_fields, option=orjson.OPT_SORT_KEYS)
    except orjson.JSONEncodeError:
        raise BadRequest("the request cannot be written as JSON") from None
    return hashlib.blake2b(encoded, digest_size=8).hexdigest()


def given_content(value: object) -> str:
    """A digest as a message carries it; empty where ``value`` is none."""
    return value if isinstance(value, str) and _DIGEST.fullmatch(value) else ""


def _fields(value: Any) -> dict[str, Any]:
    return {name: field for name, field in vars(value).items() if field is not None}


_USUAL: Final = orjson.Fragment(orjson.dumps(_fields(USUAL_PARAMS), option=orjson.OPT_SORT_KEYS))
