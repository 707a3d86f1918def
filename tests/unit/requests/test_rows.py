"""A request that runs in parts has the answer that it would have had in one piece."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from shared.contract import InferenceRequest, Usage
from tests.support.items import item_of
from workers.engines.base import EngineOutput
from workers.engines.fake import answer
from workers.requests.rows import Part, Rows
from workers.requests.sizes import CHARACTERS_PER_TOKEN, TokenEstimator, Typical, least_answer_bytes

TEXTS = ["a bat", "ü", "a much longer text", "", "cat", "a cat and a dog", "dog", "cat"]
KINDS = ["embed", "classify", "rerank", "summarize", "translate"]


def request_of(kind: str, texts: list[str], **fields: Any) -> InferenceRequest:
    inputs = {"texts": texts, **({"query": "which?"} if kind == "rerank" else {})}
    return InferenceRequest.parse({"model": "m", "kind": kind, "inputs": inputs, **fields})


def parts_of(request: InferenceRequest, *cuts: int) -> list[Part]:
    item = item_of()
    rows = item.rows = Rows(request, [1] * request.rows)
    edges = [0, *cuts, request.rows]
    return [Part(item, rows, first, last) for first, last in pairwise(edges)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [(), (1,), (3, 4), (1, 2, 3, 4, 5, 6, 7)])
@pytest.mark.parametrize("backwards", [False, True])
def test_the_answers_of_the_parts_are_the_answer_of_the_whole(kind: str, cuts: tuple[int, ...], backwards: bool):
    request = request_of(kind, TEXTS, params={"max_tokens": 4})
    parts = parts_of(request, *cuts)[:: -1 if backwards else 1]

    found = [part.rows.answer(part, answer(part.request), 5.0, 2) for part in parts]  # type: ignore[arg-type]

    expected = answer(request)
    assert isinstance(expected, EngineOutput)
    assert found[:-1] == [None] * (len(parts) - 1)
    assert found[-1] is not None
    assert (found[-1].outputs, found[-1].usage) == (expected.outputs, expected.usage)
    assert list(found[-1].outputs) == list(expected.outputs)
    assert (parts[0].rows.ran_ms, parts[0].rows.batch_size) == (5.0 * len(parts), 2)


def test_the_longest_texts_run_first():
    """So what is too long, or takes too much memory, shows at once."""
    first, *_ = parts_of(request_of("embed", TEXTS), 2, 4)

    assert first.request.inputs.texts == ("a much longer text", "a cat and a dog")
    assert (first.opens, first.whole, len(first)) == (True, False, 2)


def test_a_prompt_is_one_row():
    """Whatever else its inputs hold."""
    request = InferenceRequest.parse({"model": "m", "inputs": {"prompt": "a", "texts": ["b", "c"]}})
    (part,) = parts_of(request)

    assert (request.rows, part.whole, part.opens) == (1, True, False)
    assert part.request is request


def test_what_was_counted_and_timed_is_added_up():
    parts = parts_of(request_of("embed", ["a", "b", "c"]), 1)
    for number, part in enumerate(parts, 1):
        outputs = {"embeddings": [[0.5]] * len(part), "dimensions": 1}
        found = part.rows.answer(
            part, EngineOutput(outputs, Usage(prompt_tokens=number), 10.0, 5.0, number == 1, {"n": number}), 1.0, number
        )

    assert found is not None
    assert (found.usage.prompt_tokens, found.prefill_ms, found.decode_ms, found.cache_hit) == (3, 20.0, 10.0, True)
    assert found.metadata == {"n": 2}


@pytest.mark.parametrize("kind", KINDS)
def test_how_long_an_answer_will_be_is_known_from_its_first_part(kind: str):
    """To a few percent, and never more; of one that is written freely only what there is."""
    request = request_of(kind, [f"text {number:03}" for number in range(200)])
    first, *rest = parts_of(request, 20)
    output = answer(first.request)
    assert isinstance(output, EngineOutput)
    first.rows.answer(first, output, 1.0, 1)
    expected = first.rows.expected_bytes()
    for part in rest:
        found = part.rows.answer(part, answer(part.request), 1.0, 1)  # type: ignore[arg-type]

    assert found is not None
    whole = len(str(found.outputs).replace(" ", ""))
    assert (0.8 * whole < expected < whole) if not request.generates else expected < whole / 5


# -- sizes ------------------------------------------------------------------------------------------------------------


def test_each_row_counts_with_its_own_length_and_completion():
    estimator = TokenEstimator((10, 100))
    texts = ["x" * 40, "x" * 4, "x" * 400]

    assert estimator.measured(request_of("embed", texts))[0] == [11, 2, 101]
    assert estimator.measured(request_of("summarize", texts, params={"max_tokens": 50}))[0] == [61, 52, 151]
    pairs = [int((6 + len(text)) / CHARACTERS_PER_TOKEN) + 1 for text in texts]
    assert estimator.measured(request_of("rerank", texts))[0] == pairs


def test_requests_share_batches_by_their_longest_text():
    """Many short texts are as short as one."""
    estimator = TokenEstimator((10, 100))

    assert (
        estimator.measured(request_of("embed", ["x" * 20] * 500))[1]
        == estimator.measured(request_of("embed", ["x" * 20]))[1]
    )
    assert estimator.measured(request_of("embed", ["x", "x" * 200]))[1] == 1


def test_a_query_is_read_beside_each_text():
    estimator = TokenEstimator(())
    request = request_of("rerank", ["x" * 4] * 10)
    size = estimator.measured(request)
    estimator.learn(request.model, size.read, prompt_tokens=100)

    assert size.read == 100
    assert estimator.measured(request_of("rerank", ["x" * 4] * 2))[0] == [11, 11]


def test_a_few_large_requests_do_not_make_the_others_seem_large():
    typical = Typical()
    for rows in [1] * 50 + [4000] + [1] * 5:
        typical.seen(rows)

    assert 1 < typical.value < 1.5


def test_an_answer_s_least_length_is_that_of_its_numbers():
    request = request_of("embed", ["a"] * 20_000)

    assert least_answer_bytes(request, 384) > 16 * 2**20
    assert least_answer_bytes(request, None) == least_answer_bytes(request_of("classify", ["a"]), 384) == 0
