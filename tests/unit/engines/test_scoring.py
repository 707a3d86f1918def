"""A classification head's scores into answers."""

import numpy as np
import pytest

from shared.contract import InferenceRequest
from workers.engines.common.lengths import Piece, padded
from workers.engines.common.scoring import Labels
from workers.engines.fake import answer
from workers.engines.onnx.bias import pack


@pytest.mark.parametrize("several", [False, True])
def test_probabilities_do_not_overflow(several):
    """Scores beyond what an exponential can hold give zeros and ones, not NaN."""
    labels = Labels(("a", "b"), several)

    found = labels.classified(np.array([[5000.0, -5000.0], [-5000.0, 5000.0]], dtype=np.float32))

    assert found == {"labels": ["a", "b"], "scores": [[1.0, 0.0], [0.0, 1.0]], "label_names": ["a", "b"]}


def test_equal_scores_keep_the_order_they_were_given_in():
    """Best first; ties as they came."""
    scores = np.array([[1.0], [3.0], [1.0], [2.0]], dtype=np.float32)

    assert Labels(("x",), several=False).reranked(scores) == {"scores": [1.0, 3.0, 1.0, 2.0], "order": [1, 3, 0, 2]}


def test_packed_texts_come_back_whole():
    """Texts share rows, see only themselves, keep their positions, and are unpacked where they belong."""
    lengths = [5, 1, 9, 3, 3, 7, 2]
    pieces = [Piece([10 * n + at for at in range(length)], [0] * length) for n, length in enumerate(lengths)]
    texts = padded(pieces, 0)

    packed = pack(texts, 0, row_tokens=10)
    back = packed.unpacked(packed.ids[:, :, None].astype(np.float32), texts.mask)

    assert packed.ids.shape == (3, 10)
    assert np.array_equal(back[:, :, 0], texts.ids * texts.mask)
    assert np.array_equal(packed.unpacked(packed.place[:, :, None], texts.mask)[2, :, 0], np.arange(9))
    sees = packed.bias()[:, 0] == 0
    assert np.array_equal(sees, packed.owner[:, :, None] == packed.owner[:, None, :])


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("classify", {"labels", "scores", "label_names"}),
        ("rerank", {"scores", "order"}),
        ("summarize", {"text", "texts", "token_ids", "finish_reasons"}),
        ("translate", {"text", "texts", "token_ids", "finish_reasons"}),
    ],
)
def test_the_fake_engine_answers_alike(kind, keys):
    """The same fields as a real engine's, one entry a text, and the same again for the same request."""
    inputs = {"texts": ["abc", "de"], **({"query": "q"} if kind == "rerank" else {})}
    request = InferenceRequest.parse({"model": "m", "kind": kind, "inputs": inputs})

    found = answer(request).outputs

    assert set(found) == keys
    assert all(len(value) == 2 for key, value in found.items() if key != "text" and isinstance(value, list))
    assert found == answer(request).outputs
