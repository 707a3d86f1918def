"""One contract for every engine, over real architectures: the answers are those of transformers, batched or not."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo.setup import embedder_path
from demo.work import QUERIES, SENTENCES
from shared.contract import EngineName, InferenceRequest, Kind
from shared.errors import BadRequest, Cancelled, ContextTooLong, EngineLoadError, FleetError, UnsupportedKind
from shared.settings import ModelSpec, Settings
from tests.contract.told import check_broken_listener, check_cancelled, check_progress, check_tokens
from tests.support.engines import DECODERS, ENGINES, MAX_TOKENS, generate, greedy_tokens, prompts, run
from tests.support.fleet import ROOT
from tests.support.models import Models
from tests.support.processes import environment, left_of
from tests.support.tiny_models import (
    CONTEXT,
    make_llama,
    mean_vectors,
)
from tests.support.waiting import eventually
from workers.engines import engine_class
from workers.engines.base import EngineOutput, LoadedModel
from workers.engines.onnx.conversion import converted
from workers.engines.onnx.files import META, folder_of

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def reference(models: Models) -> dict[str, list[list[int]]]:
    """Greedy tokens of transformers.generate, each prompt alone."""
    return {name: greedy_tokens(models, name) for name in DECODERS}


# Requirements: 3.1, 3.2, 6.5
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("size", [1, 8, 64])
def test_greedy_tokens_equal_transformers(load, reference, engine: str, name: str, size: int) -> None:
    """200 prompts of mixed length in batches, and some alone: the tokens transformers.generate gives each alone."""
    model = load(engine, name)
    asked = prompts()[: 40 if size == 1 else None]

    found = run(model, [generate(prompt) for prompt in asked], size)

    assert [outcome.outputs["token_ids"] for outcome in found] == reference[name][: len(asked)]


@pytest.mark.parametrize("engine", ENGINES)
def test_log_probabilities_equal_transformers(load, models, engine: str) -> None:
    """The log probability of each token, and of the likeliest in its place, are those of a forward pass."""
    (found,) = run(load(engine, "llama"), [generate("hello", logprobs=3, ignore_eos=True)], 1)
    tokenizer = AutoTokenizer.from_pretrained(models.path("llama"))
    prompt = tokenizer("hello")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(models.path("llama"), dtype=torch.float32).eval()
    with torch.inference_mode():
        scores = model(torch.tensor([[*prompt, *found.outputs["token_ids"]]])).logits[0, len(prompt) - 1 : -1]
    wanted = torch.log_softmax(scores.double(), dim=-1)

    assert len(found.outputs["logprobs"]) == MAX_TOKENS
    for place, entry in enumerate(found.outputs["logprobs"]):
        assert entry["token_id"] == found.outputs["token_ids"][place]
        assert entry["logprob"] == pytest.approx(float(wanted[place, entry["token_id"]]), abs=1e-3)
        best = wanted[place].topk(3)
        assert [other["token_id"] for other in entry["top"]] == best.indices.tolist()
        assert [other["logprob"] for other in entry["top"]] == pytest.approx(best.values.tolist(), abs=1e-3)


@pytest.mark.parametrize("engine", ["pytorch", "onnx"])
def test_a_running_request_can_be_taken_out(load, engine: str) -> None:
    """Abort ends a request at its next token as cancelled; the others of its batch go on."""
    model = load(engine, "llama")
    short, long, aborted = (
        generate("hello", max_tokens=count, ignore_eos=True).model_copy(update={"id": name})
        for name, count in (("short", 2), ("long", 30), ("aborted", 200))
    )
    outcomes: dict[int, EngineOutput | FleetError] = {}

    def emit(index: int, outcome: EngineOutput | FleetError) -> None:
        outcomes[index] = outcome
        model.abort("aborted")

    model.infer([short, long, aborted], emit)

    assert list(outcomes) == [0, 2, 1]
    assert isinstance(outcomes[2], Cancelled)
    assert isinstance(outcomes[1], EngineOutput)


# Requirements: 3.2
@pytest.mark.parametrize("engine", ENGINES)
def test_embeddings_equal_transformers(load, models, engine: str) -> None:
    """Mean-pooled BERT vectors, batched: within 1e-4 cosine distance of transformers run on each text alone."""
    model = load(engine, "bert", kinds=["embed"])
    texts = prompts()

    requests = [
        InferenceRequest.parse({"model": "m", "kind": "embed", "inputs": {"texts": texts[i : i + 4]}})
        for i in range(0, len(texts), 4)
    ]
    vectors = np.array([v for outcome in run(model, requests, 8) for v in outcome.outputs["embeddings"]])

    alone = np.array(models.answers(mean_vectors, models.path("bert"), texts))
    cosine = (vectors * alone).sum(1) / np.linalg.norm(alone, axis=1) / np.linalg.norm(vectors, axis=1)
    assert (1 - cosine).max() < 1e-4


@pytest.mark.parametrize("engine", ENGINES)
def test_real_embedding_weights_find_the_sensible_sentence(load, engine: str) -> None:
    """With real weights the nearest sentence to each question is on its subject."""
    model = load(engine, "minilm", embedder_path(), kinds=["embed"])
    texts = [*SENTENCES, *(query for query, _ in QUERIES)]

    (outcome,) = run(model, [InferenceRequest.parse({"model": "m", "kind": "embed", "inputs": {"texts": texts}})], 1)

    vectors = np.array(outcome.outputs["embeddings"])
    assert outcome.outputs["dimensions"] == 384
    nearest = (vectors[len(SENTENCES) :] @ vectors[: len(SENTENCES)].T).argmax(1)
    assert [int(place) // 2 for place in nearest] == [sensible // 2 for _, sensible in QUERIES]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_seeded_request_does_not_depend_on_its_batch(load, engine: str) -> None:
    """The same seed gives the same tokens alone, in company, and next to greedy rows; another seed gives others."""
    model = load(engine, "llama")
    sampled = generate("abc", temperature=1.5, top_p=0.9, top_k=50, seed=3)

    (alone,) = run(model, [sampled], 1)
    company = run(model, [generate("hello there"), sampled, generate("x", temperature=1.0, seed=9), sampled], 4)
    (other,) = run(model, [generate("abc", temperature=1.5, top_p=0.9, top_k=50, seed=4)], 1)

    assert company[1].outputs == company[3].outputs == alone.outputs
    assert other.outputs["token_ids"] != alone.outputs["token_ids"]


@pytest.mark.parametrize("engine", ENGINES)
def test_stop_strings_cut_the_text(load, engine: str) -> None:
    """The answer ends before the first stop string and says so; without one it ends at max_tokens."""
    model = load(engine, "llama")
    (whole,) = run(model, [generate("abc", ignore_eos=True)], 1)
    stop = whole.outputs["text"][3:5]

    (stopped,) = run(model, [generate("abc", ignore_eos=True, stop=[stop, "never there"])], 1)

    assert (whole.outputs["finish_reason"], whole.usage.completion_tokens) == ("length", MAX_TOKENS)
    assert stopped.outputs["finish_reason"] == "stop"
    assert stopped.outputs["text"] == whole.outputs["text"][: whole.outputs["text"].index(stop)]


@pytest.mark.parametrize("engine", ENGINES)
def test_members_of_different_length_end_by_themselves(load, engine: str) -> None:
    """Short answers are reported before long ones of the same batch are done, and each has its own length."""
    model = load(engine, "qwen")
    wanted = [3, 40, 1, 20, 7]
    order: list[int] = []
    lengths: dict[int, int] = {}

    def emit(index: int, outcome: EngineOutput | FleetError) -> None:
        order.append(index)
        lengths[index] = len(outcome.outputs["token_ids"])

    model.infer([generate(f"prompt {n}", max_tokens=n, ignore_eos=True) for n in wanted], emit)

    assert order == [2, 0, 4, 3, 1]
    assert [lengths[index] for index in range(5)] == wanted


@pytest.mark.parametrize("engine", ENGINES)
def test_a_prompt_beyond_the_context_fails_alone(load, engine: str) -> None:
    """The one that does not fit is told both numbers; the others are answered; an answer is cut at the context."""
    model = load(engine, "llama")

    found = run(model, [generate("fine"), generate("x" * CONTEXT), generate("y" * (CONTEXT - 5), ignore_eos=True)], 3)

    assert isinstance(found[1], ContextTooLong)
    assert f"{CONTEXT} tokens" in str(found[1])
    assert found[0].usage.prompt_tokens == 4
    assert found[2].usage.completion_tokens == 5


@pytest.mark.parametrize("engine", ENGINES)
def test_chat_goes_through_the_models_template(load, engine: str) -> None:
    """A chat is rendered with the model's template and answered as a message."""
    model = load(engine, "llama")
    chat = InferenceRequest.parse(
        {
            "model": "m",
            "kind": "chat",
            "inputs": {"messages": [{"role": "user", "content": "hi"}]},
            "params": {"max_tokens": 4},
        }
    )

    (outcome,) = run(model, [chat], 1)
    (same,) = run(model, [generate("<|user|>hi<|end|><|assistant|>", max_tokens=4)], 1)

    assert outcome.outputs["message"] == {"role": "assistant", "content": outcome.outputs["text"]}
    assert outcome.outputs["token_ids"] == same.outputs["token_ids"]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_kind_the_model_does_not_serve(load, engine: str) -> None:
    """Asking a decoder that is not declared for it to embed is the caller's error."""
    model = load(engine, "bert", kinds=["embed"])

    (outcome,) = run(model, [generate("x")], 1)

    assert isinstance(outcome, UnsupportedKind)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_missing_model_is_named_with_what_to_do(models, engine: str) -> None:
    """A path where nothing is fails the load with the path and the key to set."""
    with pytest.raises(EngineLoadError, match=r"nothing at '/no/such/model'.*models.catalog.gone.path"):
        engine_class(engine)(models.settings()).load(ModelSpec(name="gone", path="/no/such/model"))  # type: ignore[arg-type]


def test_conversion_is_reused_and_follows_the_weights(load, models, tmp_path) -> None:
    """A converted model is not converted again; other weights or options get a conversion of their own."""
    load("onnx", "llama")
    settings = models.settings()
    spec = ModelSpec(name="llama", path=str(models.path("llama")))
    first, conversion = converted(spec, settings)
    stamp = (first / META).stat().st_mtime_ns

    again, _ = converted(spec, settings)
    torch.manual_seed(99)
    other, _ = converted(spec.model_copy(update={"path": str(make_llama(tmp_path / "llama"))}), settings)

    assert (again, (again / META).stat().st_mtime_ns) == (first, stamp)
    assert conversion.difference < 1e-4
    assert other == first, "the same weights are the same conversion, wherever they lie"
    assert folder_of(spec.model_copy(update={"path": str(models.path("qwen"))}), settings) != first
    assert folder_of(spec, models.settings(optimization={"onnx": {"enable_quantization": True}})) != first
    eventually(lambda: not list(first.parent.glob(".converting-*")), what="the end of other tests' conversions")


# Requirements: 3.2, 3.5
@pytest.mark.converts_by_process
def test_a_conversion_that_deviates_does_not_serve(models, tmp_path) -> None:
    """Above the tolerance the conversion is refused with both numbers, and nothing of it is kept."""
    settings = Settings.model_validate(
        {"models": {"cache_dir": str(tmp_path)}, "optimization": {"onnx": {"validation_tolerance": 1e-12}}}
    )

    with pytest.raises(EngineLoadError, match="deviates from the original"):
        engine_class("onnx")(settings).load(ModelSpec(name="strict", path=str(models.path("shallow"))))  # type: ignore[arg-type]

    assert list((tmp_path / "onnx").iterdir()) == []


@pytest.mark.converts_by_process
def test_models_are_loaded_while_others_are_converted(models, tmp_path) -> None:
    """Each engine of a worker has a thread, and what makes models changes PyTorch for all of them."""
    spec = ModelSpec(name="shallow", path=str(models.path("shallow")))
    settings = Settings.model_validate({"models": {"cache_dir": str(tmp_path)}})

    with ThreadPoolExecutor() as threads:
        conversion = threads.submit(converted, spec, settings)
        answers = set()
        while not conversion.done():
            loads = [threads.submit(engine_class(EngineName.PYTORCH)(settings).load, spec) for _ in range(2)]
            for loading in loads:
                (found,) = run(loading.result(), [generate("abc")], 1)
                answers.add(tuple(found.outputs["token_ids"]))

    assert conversion.result()[1].cost.largest < 1e-3
    assert len(answers) == 1


@pytest.mark.converts_by_process
def test_a_conversion_whose_process_dies_is_a_load_error(models, tmp_path, monkeypatch) -> None:
    """As the kernel ends what takes too much memory: it is said, and nothing of the conversion is left."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho allocating >&2\nkill -9 $$\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    settings = Settings.model_validate({"models": {"cache_dir": str(tmp_path)}})

    with pytest.raises(EngineLoadError, match="the process that does it ended with -9: allocating"):
        converted(ModelSpec(name="shallow", path=str(models.path("shallow"))), settings)

    assert list((tmp_path / "onnx").iterdir()) == []


@pytest.mark.converts_by_process
def test_a_conversion_ends_with_its_worker(models, tmp_path) -> None:
    """A worker that is killed leaves no process behind."""
    environ = environment()
    spec = ModelSpec(name="shallow", path=str(models.path("shallow"))).model_dump_json()
    program = (
        "from shared.settings import ModelSpec, Settings\n"
        "from workers.engines.onnx.conversion import converted\n"
        f"converted(ModelSpec.model_validate_json({spec!r}),"
        f" Settings.model_validate({{'models': {{'cache_dir': {str(tmp_path)!r}}}}}))\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], env=environ, cwd=ROOT) as worker:
        eventually(lambda: len(left_of(environ)) == 2, what="the process that converts")
        worker.kill()

    eventually(lambda: not left_of(environ), what="its end")


# Requirements: 3.2
def test_quantised_conversion_says_what_it_costs(models, tmp_path) -> None:
    """Dynamic quantisation is validated by its own measure, and the cost is recorded; where it is too much, it is said.

    Processors without instructions for 8-bit products (VNNI) saturate, which costs these random weights too much.
    """
    settings = Settings.model_validate(
        {"models": {"cache_dir": str(tmp_path)}, "optimization": {"onnx": {"enable_quantization": True}}}
    )

    spec = ModelSpec(name="small", path=str(models.path("shallow")))

    found = loaded_or_refused(settings, spec)

    if isinstance(found, EngineLoadError):
        assert re.search(r"deviates from the original by 0\.\d+; at most 0\.05 may be \(quantised\)", str(found))
        assert list((tmp_path / "onnx").iterdir()) == []
    else:
        assert found.conversion.quantised
        assert 0 < found.conversion.difference <= 0.05
        assert isinstance(run(found, [generate("abc")], 1)[0], EngineOutput)


def loaded_or_refused(settings: Settings, spec: ModelSpec) -> LoadedModel | EngineLoadError:
    """A converted model, or why it may not serve."""
    try:
        return engine_class("onnx")(settings).load(spec)  # type: ignore[arg-type]
    except EngineLoadError as error:
        return error


# Requirements: 3.3
def test_no_installed_execution_provider(load, models) -> None:
    """When none of the configured providers is installed the error names them and what there is."""
    load("onnx", "llama")  # so that it is converted
    settings = models.settings(optimization={"onnx": {"execution_providers": ["TensorrtExecutionProvider"]}})

    with pytest.raises(EngineLoadError, match="TensorrtExecutionProvider.*CPUExecutionProvider"):
        engine_class("onnx")(settings).load(ModelSpec(name="llama", path=str(models.path("llama"))))  # type: ignore[arg-type]


def test_a_model_without_a_chat_template(models, tmp_path) -> None:
    """Chat without a template is refused with what to use instead."""
    copy = shutil.copytree(models.path("llama"), tmp_path / "plain")
    (copy / "chat_template.jinja").unlink()
    model = engine_class("pytorch")(Settings()).load(ModelSpec(name="plain", path=str(copy)))  # type: ignore[arg-type]
    chat = InferenceRequest.parse(
        {"model": "m", "kind": "chat", "inputs": {"messages": [{"role": "user", "content": "hi"}]}}
    )

    (outcome,) = run(model, [chat], 1)

    assert isinstance(outcome, BadRequest)
    assert "kind=generate" in str(outcome)


@pytest.mark.parametrize("engine", ENGINES)
def test_tokens_are_told_as_they_are_made(load, engine: str) -> None:
    """What a listener hears is what is answered, as it is made; one that fails harms nobody."""
    model = load(engine, "llama")

    check_tokens(model)
    check_cancelled(model)
    check_broken_listener(model)
    check_progress(load(engine, "bert", kinds=["embed"]), Kind.EMBED)
