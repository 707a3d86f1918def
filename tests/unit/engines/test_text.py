"""What cannot fit a model is refused before it is tokenised at length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shared.contract import InferenceRequest, Kind
from shared.errors import ContextTooLong
from shared.settings import ModelSpec
from tests.support.models import Models
from workers.engines.common.text import CUT_MARGIN, FIRST_LOOK, TextCodec

CONTEXT = 200
UNKNOWN = "[UNK]"
CHARACTERS = FIRST_LOOK * (CONTEXT + CUT_MARGIN)


class Counting:
    """The tokenizer of a model, which counts the characters that it is given."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.read = 0

    def __call__(self, *texts: Any, **options: Any) -> Any:
        self.read += sum(len("".join(text)) for text in texts)
        return self._tokenizer(*texts, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


@pytest.fixture
def codec(models: Models) -> TextCodec:
    made = TextCodec(ModelSpec(name="bert", path=str(models.path("bert")), kinds=(Kind.EMBED,)), CONTEXT)
    made.tokenizer = Counting(made.tokenizer)
    return made


@pytest.fixture
def words(tmp_path: Path) -> TextCodec:
    """A tokenizer for which a word that is too long is one token, as BERT's are."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece({UNKNOWN: 0, "a": 1, "##a": 2}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=UNKNOWN).save_pretrained(tmp_path)
    made = TextCodec(ModelSpec(name="words", path=str(tmp_path), kinds=(Kind.EMBED,)), CONTEXT)
    made.tokenizer = Counting(made.tokenizer)
    return made


def request_of(kind: str, *texts: str, query: str | None = None) -> InferenceRequest:
    inputs: dict[str, Any] = {"texts": texts, "query": query}
    if kind == "generate":
        inputs = {"prompt": texts[0]}
    return InferenceRequest.parse({"model": "m", "kind": kind, "inputs": inputs})


LONG = "a cat " * 200_000


@pytest.mark.parametrize("kind", ["embed", "classify", "summarize", "translate", "generate"])
def test_a_long_text_is_looked_at_in_its_beginning_only(codec: TextCodec, kind: str):
    request = request_of(kind, LONG)

    with pytest.raises(ContextTooLong, match="more than"):
        codec.prompts(request) if kind == "generate" else codec.encode_texts(request)

    assert codec.tokenizer.read <= 3 * CHARACTERS


@pytest.mark.parametrize(("query", "texts"), [(LONG, ["a"] * 100), ("a", ["b", LONG])])
def test_a_long_query_or_text_to_rerank_too(codec: TextCodec, query: str, texts: list[str]):
    with pytest.raises(ContextTooLong, match="more than"):
        codec.encode_pairs(request_of("rerank", *texts, query=query))

    assert codec.tokenizer.read <= 3 * CHARACTERS


def test_a_long_chat_too(codec: TextCodec):
    codec.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    messages = [{"role": "user", "content": LONG}, {"role": "assistant", "content": "no"}]
    request = InferenceRequest.parse({"model": "m", "kind": "chat", "inputs": {"messages": messages}})
    codec.tokenizer._tokenizer.chat_template = codec.tokenizer.chat_template

    with pytest.raises(ContextTooLong, match="more than"):
        codec.prompts(request)

    assert codec.tokenizer.read <= 3 * CHARACTERS


def test_a_long_text_of_few_tokens_fits(words: TextCodec):
    """Length alone refuses nothing: neither a word that is one token, nor room between words, nor a word cut in two."""
    for text in ("x" * 10 * CHARACTERS, "a " + " " * 10 * CHARACTERS + "a", "a" * (CHARACTERS - 90) + "x" * CHARACTERS):
        (piece,) = words.encode_texts(request_of("embed", text))

        assert len(piece.ids) <= 2


def test_a_text_that_fits_is_read_once(codec: TextCodec):
    text = "a cat " * 20
    codec.encode_texts(request_of("embed", text))

    assert codec.tokenizer.read == len(text)


# -- before a request runs in parts -----------------------------------------------------------------------------------


def test_only_texts_that_may_not_fit_are_looked_at_before(codec: TextCodec):
    codec.check_texts(request_of("embed", *["a cat"] * 1000))

    assert codec.tokenizer.read == 0


@pytest.mark.parametrize("kind", ["embed", "rerank", "summarize"])
def test_one_text_among_many_that_does_not_fit_is_found_before(codec: TextCodec, kind: str):
    texts = ["a cat"] * 300 + ["a cat " * 150] + ["a cat"] * 300

    with pytest.raises(ContextTooLong):
        codec.check_texts(request_of(kind, *texts, query="which?" if kind == "rerank" else None))
