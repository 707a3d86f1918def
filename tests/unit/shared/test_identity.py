"""What makes two requests the same one."""

import uuid

import pytest

from shared.contract import InferenceRequest, SamplingParams
from shared.identity import content_of, given_content, id_in_fleet


def request(**fields) -> InferenceRequest:
    """A request, with the fields given."""
    return InferenceRequest.parse({"model": "m", "inputs": {"prompt": "a"}, **fields})


@pytest.mark.parametrize(
    "other",
    [
        {"model": "n"},
        {"inputs": {"prompt": "b"}},
        {"kind": "embed", "inputs": {"texts": ["a"]}},
        {"kind": "chat", "inputs": {"messages": [{"role": "user", "content": "a"}]}},
        {"params": {"max_tokens": 7}},
        {"params": {"json_schema": {"type": "object"}}},
        {"tenant": "acme"},
    ],
)
def test_another_content_has_another_digest(other):
    """Tenant, model, kind, inputs and parameters count."""
    assert content_of(request()) != content_of(request(**other))


@pytest.mark.parametrize(
    "same",
    [
        {"id": "x"},
        {"priority": "high", "deadline": 4e9, "engine_preference": ["onnx"], "conversation_id": "c", "stream": True},
        {"params": {"max_tokens": 64, "seed": None}, "kind": "generate", "tenant": "default"},
    ],
)
def test_the_same_content_has_the_same_digest(same):
    """How and when it is to be run does not count, nor whether a default was spelt out."""
    assert content_of(request()) == content_of(request(**same))


def test_the_order_in_which_a_schema_is_written_does_not_count():
    one, other = ({"params": {"json_schema": schema}} for schema in ({"a": 1, "b": 2}, {"b": 2, "a": 1}))

    assert content_of(request(**one)) == content_of(request(**other))


def test_a_digest_is_what_it_was():
    """What is kept in the broker outlives a release: the digests of one and of the next are the same."""
    assert content_of(request()) == "85444212c67a8fcc"
    assert given_content(content_of(request())) == "85444212c67a8fcc"
    assert [given_content(value) for value in (None, 7, "", "x" * 16, "0" * 17)] == [""] * 5


def test_an_id_has_the_name_of_its_tenant_in_front_once():
    assert [id_in_fleet("x", "default"), id_in_fleet("x", "acme"), id_in_fleet("acme/x", "acme")] == [
        "x", "acme/x", "acme/x",
    ]  # fmt: skip


def test_an_id_that_nobody_gave_is_a_random_uuid() -> None:
    """Of version 4, as the library writes it."""
    made = {InferenceRequest.parse({"model": "m", "inputs": {"prompt": "a"}}).id for _ in range(1000)}

    assert len(made) == 1000
    for name in made:
        parsed = uuid.UUID(name)
        assert (str(parsed), parsed.version, parsed.variant) == (name, 4, uuid.RFC_4122)


@pytest.mark.parametrize("params", [{}, {"temperature": 0.5}, SamplingParams()])
def test_the_usual_parameters_are_written_once(params: object) -> None:
    """Their digest is that of the same parameters, whoever made them."""
    given = request(params=params)
    made = given.model_copy(update={"params": SamplingParams.model_validate(given.params.model_dump())})

    assert content_of(made) == content_of(given)
