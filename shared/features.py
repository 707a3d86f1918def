"""What a request may need of a worker beyond the kind: decided for each of its fields, in one table.

A worker refuses a request with a field that it does not know. So a field that workers of release 0.1.0 do not know
needs a feature, and only engines that announce the feature are asked. Whoever adds a field to a request adds its line
here; one that needs a feature is ``None`` where it is not given.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from operator import attrgetter
from typing import Final

from pydantic import BaseModel


class Feature(StrEnum):
    """What a request may need of an engine beyond its kind: the chain leaves out engines that have it not."""

    LOGPROBS = "logprobs"
    JSON_SCHEMA = "json_schema"
    TIMEOUT = "timeout"


NOTHING: Final[frozenset[Feature]] = frozenset()

EVERYWHERE: Final = frozenset({Feature.TIMEOUT})
"""What every engine of this release has, for no engine has a part in it."""

FEATURE_OF_FIELD: Final[Mapping[str, Feature | None]] = {
    "id": None,
    "model": None,
    "kind": None,  # a worker announces the kinds that it serves with each model
    "inputs": None,
    "inputs.prompt": None,
    "inputs.messages": None,
    "inputs.messages.role": None,
    "inputs.messages.content": None,
    "inputs.texts": None,
    "inputs.query": None,
    "params": None,
    "params.max_tokens": None,
    "params.temperature": None,
    "params.top_p": None,
    "params.top_k": None,
    "params.stop": None,
    "params.seed": None,
    "params.ignore_eos": None,
    "params.logprobs": Feature.LOGPROBS,
    "params.json_schema": Feature.JSON_SCHEMA,
    "engine_preference": None,
    "conversation_id": None,
    "priority": None,
    "deadline": None,
    "timeout": Feature.TIMEOUT,
    "tenant": None,
    "stream": None,
}
"""Every field of a request, and the feature that a request with it needs: none for what every worker knows."""

_NEEDED: Final = {field: feature for field, feature in FEATURE_OF_FIELD.items() if feature is not None}
_VALUES: Final = attrgetter(*_NEEDED)
_UNASKED: Final = (None,) * len(_NEEDED)

NAMES: Final = frozenset(field.rpartition(".")[2] for field in _NEEDED)
"""The fields that need a feature, as the values call them that they are fields of."""


def features_of(request: BaseModel) -> frozenset[Feature]:
    """The features that a request needs: those of its fields that are not ``None``."""
    values = _VALUES(request)
    if values == _UNASKED:
        return NOTHING
    return frozenset(feature for feature, value in zip(_NEEDED.values(), values, strict=True) if value is not None)
