"""Texts of any lengths run side by side and are answered as if each were alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.contract import InferenceRequest, Kind
from shared.errors import ContextTooLong, FleetError
from workers.engines.base import EngineOutput
from workers.engines.common.lengths import TEXTS_AT_ONCE, Floats, Padded, Piece, run_together

pytestmark = pytest.mark.property

PIECES = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=30), min_size=1, max_size=40)
MOST = 25
"""Tokens in a text that the model takes."""


def digest(ids: list[int]) -> tuple[int, int]:
    """What the model says of a text: anything that depends on its tokens and their places."""
    return sum(ids), sum(place * token for place, token in enumerate(ids))


# Feature: advanced-optimization-monitoring, Property 8: rows of a batch are padded to one length
@settings(max_examples=100, deadline=None, derandomize=True)
@given(texts=st.lists(PIECES, min_size=1, max_size=6))
def test_rows_have_one_length_and_padding_changes_no_answer(texts: list[list[list[int]]]) -> None:
    """Every call has rows of one length, sorted so that little is padding; each answer goes to the text it is of."""
    requests = [
        InferenceRequest.parse({"model": "m", "kind": Kind.EMBED, "inputs": {"texts": ["x"]}, "id": str(number)})
        for number in range(len(texts))
    ]
    calls: list[Padded] = []
    refused: dict[int, EngineOutput | FleetError] = {}

    def encode(request: InferenceRequest) -> list[Piece]:
        rows = texts[int(request.id)]
        if max(map(len, rows)) > MOST:
            raise ContextTooLong("a text is too long")
        return [Piece(row, [0] * len(row)) for row in rows]

    def forward(batch: Padded) -> Floats:
        calls.append(batch)
        rows = zip(batch.ids, batch.mask, strict=True)
        return np.array([digest(ids[mask == 1].tolist()) for ids, mask in rows], dtype=np.float32)

    answers = {
        member.index: member.vectors.tolist()
        for member in run_together(requests, encode, 0, forward, refused.__setitem__)
    }

    fit = {number for number, rows in enumerate(texts) if max(map(len, rows)) <= MOST}
    assert answers == {number: [[*map(float, digest(row))] for row in texts[number]] for number in fit}
    assert refused.keys() == set(range(len(texts))) - fit
    for batch in calls:
        lengths = batch.mask.sum(axis=1)
        assert batch.ids.shape == batch.mask.shape == batch.types.shape == (len(lengths), lengths.max())
        assert len(lengths) <= TEXTS_AT_ONCE
    in_order = [length for batch in calls for length in batch.mask.sum(axis=1)]
    assert in_order == sorted(in_order)
