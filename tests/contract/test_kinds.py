"""Classifying, reranking and rewriting on every engine: the answers are those of transformers for each text alone."""

from __future__ import annotations

import json
import logging
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from shared.contract import InferenceRequest, Kind
from shared.errors import ContextTooLong, EngineLoadError, UnsupportedKind
from shared.settings import ModelSpec, Settings
from tests.contract.told import check_progress, check_texts
from tests.support.engines import ENGINES, prompts, run
from tests.support.items import item_of
from tests.support.tiny_models import (
    CONTEXT,
    PREFIX,
    classified_reference,
    mean_vectors,
    rewritten_reference,
)
from workers.engines import engine_class
from workers.engines.base import EngineOutput, LoadedModel
from workers.engines.onnx.files import META
from workers.requests.rows import Part, Rows

TEXTS = 40
MAX_TOKENS = 10

pytestmark = pytest.mark.timeout(300)


def ask(kind: str, texts: list[str] | str, **fields: object) -> InferenceRequest:
    """A request of a kind that takes texts."""
    query = fields.pop("query", None)
    inputs = {"texts": texts, **({"query": query} if query else {})}
    return InferenceRequest.parse({"model": "m", "kind": kind, "inputs": inputs, **fields})


def fresh(engine: str, path: Path, settings: dict | None = None, **spec: object) -> LoadedModel:
    """A model that is not kept."""
    declared = ModelSpec.model_validate({"name": path.name, "path": str(path), **spec})
    return engine_class(engine)(Settings.model_validate(settings or {})).load(declared)  # type: ignore[arg-type]


def in_threes(kind: str, texts: list[str], **fields: object) -> list[InferenceRequest]:
    """Requests of one to three texts each."""
    sizes, requests, first = [1, 3, 2], [], 0
    while first < len(texts):
        size = sizes[len(requests) % 3]
        requests.append(ask(kind, texts[first : first + size], **fields))
        first += size
    return requests


@pytest.mark.parametrize(("engine", "name"), [("pytorch", "three"), ("onnx", "three"), ("pytorch", "several")])
def test_classes_equal_transformers(load, models, engine: str, name: str) -> None:
    """Probabilities of every label, batched: those of each text alone; a multi-label head's by themselves."""
    model = load(engine, name, kinds=["classify"])
    texts = prompts(TEXTS)

    found = [outcome.outputs for outcome in run(model, in_threes("classify", texts), 8)]

    logits = np.array(models.answers(classified_reference, models.path(name), texts))
    exp = np.exp(logits)
    expected = 1 / (1 + 1 / exp) if name == "several" else exp / exp.sum(1, keepdims=True)
    scores = np.array([row for outputs in found for row in outputs["scores"]])
    assert np.abs(scores - expected).max() < 1e-4
    assert [label for outputs in found for label in outputs["labels"]] == [f"label-{n}" for n in logits.argmax(1)]
    assert found[0]["label_names"] == ["label-0", "label-1", "label-2"]


@pytest.mark.parametrize(("engine", "name"), [("pytorch", "score"), ("onnx", "score"), ("pytorch", "fits")])
def test_reranking_equals_transformers(load, models, engine: str, name: str) -> None:
    """Each text is scored as a pair with the query; the order is from the best to the worst."""
    model = load(engine, name, kinds=["rerank"])
    texts = prompts(TEXTS)

    found = [outcome.outputs for outcome in run(model, in_threes("rerank", texts, query="what is it?"), 8)]

    pairs = ["what is it?"] * len(texts), texts
    expected = np.array(models.answers(classified_reference, models.path(name), *pairs))[:, -1]
    assert np.abs(np.array([score for outputs in found for score in outputs["scores"]]) - expected).max() < 1e-4
    for outputs in found:
        scores = outputs["scores"]
        assert [scores[index] for index in outputs["order"]] == sorted(scores, reverse=True)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("name", "prefix"), [("t5", PREFIX), ("bart", "")])
@pytest.mark.parametrize("size", [1, 16])
def test_rewritten_tokens_equal_transformers(load, models, engine: str, name: str, prefix: str, size: int) -> None:
    """Summaries of texts of mixed length, alone and in batches: the tokens transformers.generate gives each alone."""
    model = load(engine, name, kinds=["summarize", "translate"])
    texts = prompts(TEXTS)

    outcomes = run(model, in_threes("summarize", texts, params={"max_tokens": MAX_TOKENS}), size)
    found = [outcome.outputs for outcome in outcomes]

    expected = models.answers(rewritten_reference, models.path(name), [prefix + text for text in texts], MAX_TOKENS)
    assert [tokens for outputs in found for tokens in outputs["token_ids"]] == expected
    assert all(outputs["text"] == outputs["texts"][0] for outputs in found)
    reasons = [reason for outputs in found for reason in outputs["finish_reasons"]]
    assert reasons == ["length" if len(tokens) == MAX_TOKENS else "stop" for tokens in expected]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_prefix_of_a_task_and_of_a_declaration(load, models, engine: str) -> None:
    """T5 names one prefix for summaries and two for translations: those need the declaration's."""
    model = load(engine, "t5", kinds=["summarize", "translate"])
    params = {"max_tokens": MAX_TOKENS}

    requests = [ask("summarize", "abc", params=params), ask("summarize", ["abc", "defgh"], params=params)]
    summaries = run(model, requests, 2)
    (plain,) = run(model, [ask("translate", PREFIX + "abc", params=params)], 1)

    assert summaries[0].outputs["token_ids"][0] == summaries[1].outputs["token_ids"][0]
    assert summaries[0].outputs["token_ids"] == plain.outputs["token_ids"]
    declared = fresh("pytorch", models.path("t5"), kinds=["translate"], prefix=PREFIX)
    (same,) = run(declared, [ask("translate", "abc", params=params)], 1)
    assert same.outputs["token_ids"] == plain.outputs["token_ids"]


@pytest.mark.parametrize("engine", ENGINES)
def test_seeds_and_stop_strings_of_summaries(load, models, engine: str) -> None:
    """As for generated text: a seeded summary is the same in any company, and a stop string cuts each text."""
    model = load(engine, "t5", kinds=["summarize", "translate"])
    seeded = {"max_tokens": 8, "temperature": 1.5, "top_k": 40, "seed": 5}

    (alone,) = run(model, [ask("summarize", "abc", params=seeded)], 1)
    company = run(model, [ask("summarize", ["x" * 50, "y"]), ask("summarize", ["abc", "z"], params=seeded)], 2)
    assert company[1].outputs["token_ids"][0] == alone.outputs["token_ids"][0]

    whole = {"max_tokens": MAX_TOKENS, "ignore_eos": True}
    (long,) = run(model, [ask("summarize", "abc", params=whole)], 1)
    stop = long.outputs["text"][2:4]
    (cut,) = run(model, [ask("summarize", "abc", params={**whole, "stop": [stop]})], 1)
    assert cut.outputs["finish_reasons"] == ["stop"]
    assert cut.outputs["text"] == long.outputs["text"][: long.outputs["text"].index(stop)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("name", "kind", "fields"),
    [("three", "classify", {}), ("score", "rerank", {"query": "q"}), ("t5", "summarize", {})],
)
def test_a_text_beyond_the_context_fails_alone(load, models, engine: str, name: str, kind: str, fields: dict) -> None:
    """The request with it is told both numbers; the others of the batch are answered."""
    kinds = {"t5": ["summarize", "translate"]}.get(name, [kind])
    model = load(engine, name, kinds=kinds)

    found = run(model, [ask(kind, ["fine", text], **fields) for text in ("a", "x" * (CONTEXT + 1), "b")], 3)

    assert isinstance(found[1], ContextTooLong)
    assert str(CONTEXT) in str(found[1])
    assert isinstance(found[0], EngineOutput)
    assert isinstance(found[2], EngineOutput)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_rewritten_text_ends_at_the_context(load, models, engine: str) -> None:
    """Learnt positions end somewhere: so does the answer, whatever ``max_tokens`` says."""
    model = load(engine, "bart", kinds=["summarize", "translate"])

    (outcome,) = run(model, [ask("translate", "abc", params={"max_tokens": 9 * CONTEXT, "ignore_eos": True})], 1)

    assert outcome.outputs["finish_reasons"] == ["length"]
    assert outcome.usage.completion_tokens == CONTEXT - 1


@pytest.mark.parametrize("engine", ENGINES)
def test_a_kind_that_was_not_declared(load, models, engine: str) -> None:
    """A classifier that is not declared for it does not rerank: the caller's error."""
    model = load(engine, "three", kinds=["classify"])

    (outcome,) = run(model, [ask("rerank", "x", query="q")], 1)

    assert isinstance(outcome, UnsupportedKind)


@pytest.mark.parametrize("engine", ["pytorch", "onnx"])
@pytest.mark.parametrize(
    ("name", "kinds", "words"),
    [
        ("bert", ["summarize"], "declared for summarize, which needs a sequence-to-sequence model; it is a BertModel"),
        ("bert", ["classify"], "which needs a sequence classifier; it is a BertModel: its weights lack classifier"),
        ("bert", ["generate"], "which needs a causal language model; it is a BertModel: its weights lack cls"),
        ("bart", ["generate"], "which needs a causal language model; it is a BartForConditionalGeneration"),
        ("t5", ["embed"], "which needs a text encoder; it is a T5ForConditionalGeneration"),
        ("three", ["rerank"], "has 3 labels; a cross-encoder has one, or two"),
        ("llama", ["generate", "summarize"], "different sorts of model answer"),
    ],
)
def test_a_model_that_does_not_fit_its_declaration(
    models, tmp_path, engine: str, name: str, kinds: list, words: str
) -> None:
    """The load fails and says what the kind needs and what the model is."""
    with pytest.raises(EngineLoadError, match=words):
        fresh(engine, models.path(name), {"models": {"cache_dir": str(tmp_path)}}, kinds=kinds)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize(
    ("name", "kinds", "words"),
    [
        ("bert", ["generate"], "which needs a causal language model; it is a BertModel: its weights lack cls"),
    ],
)
def test_what_a_process_of_a_model_finds_is_the_loads_error(models, name: str, kinds: list, words: str) -> None:
    """The same is found where a model is loaded by a process of its own, and told by the worker."""
    with pytest.raises(EngineLoadError, match=words):
        fresh("deepspeed", models.path(name), kinds=kinds)


def test_texts_that_share_rows_are_embedded_as_if_alone(load, models) -> None:
    """The converted encoder puts several texts into a row, and RoBERTa's positions begin behind its padding's id."""
    name = "roberta"
    model = load("onnx", name, kinds=["embed"])
    texts = prompts(TEXTS)

    (outcome,) = run(model, [ask("embed", texts)], 1)

    alone = np.array(models.answers(mean_vectors, models.path(name), texts))
    assert model.conversion.packs
    expected = alone / np.linalg.norm(alone, axis=1, keepdims=True)
    assert np.abs(np.array(outcome.outputs["embeddings"]) - expected).max() < 1e-4


def test_what_quantising_costs_is_kept_and_said(models, tmp_path, caplog) -> None:
    """Differences and the share of answers that stay the same are beside the conversion and in the log."""
    settings = {"models": {"cache_dir": str(tmp_path)}, "optimization": {"onnx": {"enable_quantization": True}}}
    with caplog.at_level(logging.INFO, "workers.engines.onnx.conversion"):
        model = fresh("onnx", models.path("bert"), settings, kinds=["embed"])

    (kept,) = tmp_path.glob(f"onnx/*/{META}")
    cost = json.loads(kept.read_text())["cost"]
    assert 0 < cost["mean"] < cost["largest"]
    assert 0 <= cost["agreement"] <= 1
    assert "quantised: differences of outputs: largest" in caplog.text
    assert isinstance(run(model, [ask("embed", ["abc", "a longer one"])], 1)[0], EngineOutput)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_listener_hears_of_rewriting_and_scoring(load, engine: str) -> None:
    """The tokens of each text under its own index; a long classification makes progress without tokens."""
    check_texts(load(engine, "t5", kinds=["summarize", "translate"]))
    check_progress(load(engine, "three", kinds=["classify"]), Kind.CLASSIFY)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("name", "kinds"),
    [("bert", ["embed"]), ("three", ["classify"]), ("score", ["rerank"]), ("t5", ["summarize", "translate"])],
)
def test_a_request_that_runs_in_parts_is_answered_as_in_one(load, engine: str, name: str, kinds: list[str]) -> None:
    """What can be told before is: which text does not fit, and how long an embedding is."""
    model = load(engine, name, kinds=kinds)
    kind = Kind(kinds[0])
    query = {"query": "which?"} if kind is Kind.RERANK else {}
    request = ask(kind, prompts(TEXTS), params={"max_tokens": MAX_TOKENS}, **query)
    rows = Rows(request, [1] * TEXTS)
    parts = [Part(item_of(), rows, first, min(TEXTS, first + 16)) for first in range(0, TEXTS, 16)]

    (whole,) = run(model, [request], 1)
    answers = [rows.answer(part, *run(model, [part.request], 1), 1.0, 1) for part in parts]  # type: ignore[call-arg]

    joined = answers[-1]
    assert isinstance(whole, EngineOutput)
    assert joined is not None
    assert joined.usage == whole.usage
    for key, value in whole.outputs.items():
        if key in ("embeddings", "scores"):
            assert np.abs(np.array(value) - np.array(joined.outputs[key])).max() < 1e-5
        elif key != "order":  # near ties may change places
            assert joined.outputs[key] == value
    model.check(request)
    with pytest.raises(ContextTooLong):
        model.check(ask(kind, [*prompts(3), "x" * (CONTEXT + 1)], **query))
    if kind is Kind.EMBED and engine != "deepspeed":
        assert model.dimensions == whole.outputs["dimensions"]
