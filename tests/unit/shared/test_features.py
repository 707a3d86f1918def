"""What a request needs of a worker follows from its fields: each of them is decided for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import pytest
from pydantic import BaseModel

from shared.contract import EngineName, InferenceRequest, Kind
from shared.errors import UnsupportedKind
from shared.features import FEATURE_OF_FIELD, Feature
from shared.registry import EngineInfo, ServedModel, WorkerInfo
from shared.routing import choose
from shared.settings import Settings
from tests.compatibility import RELEASES, read_json

VALUES = {"params.logprobs": 2, "params.json_schema": {"type": "object"}, "timeout": 5.0}
"""A value for each field that needs a feature."""


def fields_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every field of a request, those of the values in it under dotted names."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for inner in models_in(field.annotation):
            yield from fields_of(inner, f"{prefix}{name}.")


def models_in(annotation: object) -> Iterator[type[BaseModel]]:
    """The pydantic models that a type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from models_in(part)


def request_with(field: str | None = None, value: object = None) -> InferenceRequest:
    """A request, with a value for one more field."""
    data: dict[str, object] = {"model": "m", "inputs": {"prompt": "x"}}
    if field is not None:
        section, _, name = field.rpartition(".")
        data |= {section: {name: value}} if section else {name: value}
    return InferenceRequest.parse(data)


def test_every_field_is_decided_for() -> None:
    """A field that is added to a request, its parameters or its inputs has a line in the table, and no other has."""
    assert set(FEATURE_OF_FIELD) == set(fields_of(InferenceRequest))


def test_a_field_that_a_release_does_not_know_needs_a_feature() -> None:
    """Only what every release knows needs none: a worker of 0.1.0 refuses a request with any other field."""
    free = {field for field, feature in FEATURE_OF_FIELD.items() if feature is None}

    for release in RELEASES:
        known = read_json(release / "fields.json")
        assert free <= set(known)


@pytest.mark.parametrize(("field", "feature"), [(f, x) for f, x in FEATURE_OF_FIELD.items() if x is not None])
def test_a_field_is_sent_only_to_those_that_know_it(field: str, feature: Feature) -> None:
    """Given, it needs its feature; given as None it asks for nothing and is not in the message."""
    given, nothing = request_with(field, VALUES[field]), request_with(field, None)

    assert given.features == {feature}
    assert nothing.features == request_with().features == frozenset()
    name = field.rpartition(".")[2]
    assert name in str(given.given())
    assert name not in str(nothing.given())


def test_workers_that_do_not_announce_the_feature_are_not_asked() -> None:
    """Of two workers the one that knows the field is chosen; with the other alone the error says what is missing."""
    old, new = (
        WorkerInfo(
            id=engine, host="h", pid=1, started=0.0, queues=(engine,),
            engines=(EngineInfo(name=engine, features=features, models={"m": ServedModel(kinds=(Kind.GENERATE,))}),),
        )
        for engine, features in ((EngineName.ONNX, ()), (EngineName.PYTORCH, tuple(Feature)))
    )  # fmt: skip
    request = request_with("params.logprobs", 2)

    assert choose(request_with(), [old, new], Settings()) is EngineName.ONNX
    assert choose(request, [old, new], Settings()) is EngineName.PYTORCH
    with pytest.raises(UnsupportedKind, match="logprobs"):
        choose(request, [old], Settings())
