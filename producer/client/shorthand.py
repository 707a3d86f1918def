"""Requests as people write them: ``{"prompt": "..."}`` with the rest filled in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared.contract import Inputs, Kind, SamplingParams
from shared.errors import BadRequest

_INPUTS = (*Inputs.model_fields, "text")
_PARAMS = tuple(SamplingParams.model_fields)
_KIND_OF_INPUT = {"query": Kind.RERANK, "messages": Kind.CHAT, "texts": Kind.EMBED, "prompt": Kind.GENERATE}


def complete(data: Mapping[str, Any], *, model: str | None = None, kind: Kind | None = None) -> dict[str, Any]:
    """The request that ``data`` stands for, not validated yet.

    Inputs (``prompt``, ``messages``, ``text``, ``texts``, ``query``) and sampling parameters (``max_tokens``, ...) may
    stand beside the request's own fields. ``model`` and ``kind`` count where the request has none; without a kind, the
    inputs tell it. Raises :class:`BadRequest` where something is given twice.
    """
    request = {key: value for key, value in data.items() if key not in _INPUTS and key not in _PARAMS}
    inputs = _gathered("inputs", _INPUTS, data)
    if "text" in inputs:
        if "texts" in inputs:
            raise BadRequest("text and texts are one thing: give one of them")
        inputs["texts"] = inputs.pop("text")
    if inputs:
        request["inputs"] = inputs
    if params := _gathered("params", _PARAMS, data):
        request["params"] = params
    if model is not None:
        request.setdefault("model", model)
    if kind is not None:
        request.setdefault("kind", kind)
    given = request.get("inputs")
    if "kind" not in request and isinstance(given, Mapping):
        request["kind"] = next((known for key, known in _KIND_OF_INPUT.items() if key in given), Kind.GENERATE)
    return request


def _gathered(field: str, names: tuple[str, ...], data: Mapping[str, Any]) -> dict[str, Any]:
    """What stands under ``names`` in ``data``; it may not also stand in ``field``."""
    found = {name: data[name] for name in names if name in data}
    if found and field in data:
        raise BadRequest(f"{', '.join(found)} and {field} are both given: put them into {field}")
    return found
