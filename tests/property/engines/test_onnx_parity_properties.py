"""A converted model gives the original's answers: one conversion, random texts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertModel

from demo.train import make_tokenizer
from shared.contract import EngineName, InferenceRequest
from shared.settings import ModelSpec, Settings
from tests.support.models import converting_here
from workers.engines import engine_class
from workers.engines.base import LoadedModel
from workers.models.parity import agreement, ask

pytestmark = pytest.mark.property

TEXTS = st.lists(st.text(min_size=1, max_size=60).filter(str.strip), min_size=1, max_size=4)
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LoadedModel, LoadedModel]]:
    """A small encoder with random weights, as PyTorch runs it and converted."""
    folder = tmp_path_factory.mktemp("encoder")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(5)
    tokenizer = make_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, max_position_embeddings=128, **sizes
    )
    model = BertModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.3)  # wide enough that every part of the graph matters
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    configured = Settings.model_validate({"models": {"cache_dir": str(folder / "cache")}})
    spec = ModelSpec.model_validate(
        {"name": "m", "path": str(folder), "kinds": ["embed"], "options": {"onnx": {"intra_op_threads": 1}}}
    )
    with converting_here():
        original, converted = (
            engine_class(name)(configured).load(spec) for name in (EngineName.PYTORCH, EngineName.ONNX)
        )
    yield original, converted
    original.close()
    converted.close()
    torch.set_num_threads(before)


# Feature: advanced-optimization-monitoring, Property 4: a converted model answers as the original does
@settings(max_examples=100, deadline=None, derandomize=True)
@given(batches=st.lists(TEXTS, min_size=1, max_size=2))
def test_any_texts_have_the_originals_vectors(loaded, batches: list[list[str]]) -> None:
    """Of any script and length, alone or packed into rows with others, and at other places in the batch."""
    original, converted = loaded
    asked = [InferenceRequest.parse({"model": "m", "kind": "embed", "inputs": {"texts": texts}}) for texts in batches]

    wanted, found = ask(original, asked), ask(converted, asked)

    assert agreement(found, wanted)[1] < TOLERANCE
    for texts, answer, same in zip(batches, found, wanted, strict=True):
        assert answer is not None
        assert same is not None
        vectors = np.array(answer["embeddings"])
        assert vectors.shape[0] == len(texts)
        np.testing.assert_allclose(vectors, np.array(same["embeddings"]), atol=TOLERANCE)
