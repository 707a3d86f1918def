"""Requests as people write them."""

import pytest

from producer.client.shorthand import complete
from shared.contract import InferenceRequest, Kind
from shared.errors import BadRequest


@pytest.mark.parametrize(
    ("data", "kind", "inputs"),
    [
        ({"prompt": "a"}, Kind.GENERATE, {"prompt": "a"}),
        ({"messages": [{"role": "user", "content": "a"}]}, Kind.CHAT, {"messages": [{"role": "user", "content": "a"}]}),
        ({"text": "a"}, Kind.EMBED, {"texts": "a"}),
        ({"texts": ["a", "b"]}, Kind.EMBED, {"texts": ["a", "b"]}),
        ({"inputs": {"prompt": "a"}}, Kind.GENERATE, {"prompt": "a"}),
        ({"kind": "classify", "text": "a"}, "classify", {"texts": "a"}),
        ({"query": "q", "texts": ["a", "b"]}, Kind.RERANK, {"query": "q", "texts": ["a", "b"]}),
    ],
)
def test_the_inputs_tell_the_kind(data, kind, inputs):
    """Without a kind, what is given decides; a kind that is there stays."""
    request = complete(data)

    assert request["kind"] == kind
    assert request["inputs"] == inputs


def test_defaults_fill_what_is_missing_only():
    """The command line's model and kind do not override the line's own."""
    bare = complete({"prompt": "a"}, model="m", kind=Kind.SUMMARIZE)
    own = complete({"prompt": "a", "model": "x", "kind": "generate"}, model="m", kind=Kind.SUMMARIZE)

    assert (bare["model"], bare["kind"]) == ("m", Kind.SUMMARIZE)
    assert (own["model"], own["kind"]) == ("x", "generate")


def test_sampling_parameters_may_stand_beside():
    """``max_tokens`` and its like go where they belong; the whole is a valid request."""
    request = InferenceRequest.parse(
        complete({"prompt": "a", "max_tokens": 5, "stop": ["x"], "tenant": "t"}, model="m")
    )

    assert (request.params.max_tokens, request.params.stop, request.tenant) == (5, ("x",), "t")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"prompt": "a", "inputs": {"prompt": "b"}}, "prompt and inputs are both given"),
        ({"max_tokens": 1, "params": {}}, "max_tokens and params are both given"),
        ({"text": "a", "texts": ["b"]}, "give one of them"),
    ],
)
def test_what_is_given_twice_is_refused(data, message):
    """Nothing is chosen silently."""
    with pytest.raises(BadRequest, match=message):
        complete(data)


@pytest.mark.parametrize("data", [{}, {"inputs": 3}, {"inputs": None}, {"promt": "a"}])
def test_what_is_no_request_is_left_to_the_contract(data):
    """Completing never fails on odd data; validation then names what is wrong."""
    with pytest.raises(BadRequest):
        InferenceRequest.parse(complete(data, model="m"))
