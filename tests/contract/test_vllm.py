"""vLLM: the answers of transformers, everything that a request may ask for, and one end for all of its processes."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from demo.setup import embedder_path
from demo.work import QUERIES, SENTENCES
from shared.contract import InferenceRequest, Kind
from shared.errors import BadRequest, Cancelled, ContextTooLong, EngineDied, EngineError, EngineLoadError
from shared.settings import ModelSpec, Settings
from tests.contract.told import check_broken_listener, check_cancelled, check_progress, check_tokens
from tests.support.engines import DECODERS, MAX_TOKENS, generate, greedy_tokens, prompts, run
from tests.support.models import Models
from tests.support.tiny_models import CONTEXT, mean_vectors
from tests.support.waiting import eventually
from workers.engines.base import EngineOutput

pytest.importorskip("vllm", reason="vLLM is not installed: make setup-engines")

from workers.engines.vllm.engine import VLLMEngine, VLLMModel  # after the check that vLLM is here

Load = Callable[..., VLLMModel]

pytestmark = pytest.mark.timeout(900)


def start(path: Path, **changes: object) -> VLLMModel:
    """An engine core with a model."""
    kinds = changes.pop("kinds", ["generate", "chat"])
    settings = Settings.model_validate({"optimization": {"vllm": {"max_num_seqs": 64, **changes}}})
    model = VLLMEngine(settings).load(ModelSpec.model_validate({"name": "m", "path": str(path), "kinds": kinds}))
    model.warmup()
    return model


@pytest.fixture(scope="module")
def llama(models: Models) -> Iterator[VLLMModel]:
    """A core that the tests of this file share."""
    model = start(models.path("llama"))
    yield model
    model.close()


def process_inputs() -> None:
    """Stands for vLLM's function of this name, which reads a request."""
    raise ValueError("a value that cannot be")


def test_an_error_of_vllm_is_the_callers_only_where_it_reads_the_request(llama) -> None:
    """A schema that its compiler refuses is; the same type of error from anywhere else is the engine's, and hops."""
    with pytest.raises(ValueError, match="cannot be") as raised:
        process_inputs()

    assert isinstance(llama._as_error(raised.value), BadRequest)
    assert type(llama._as_error(ValueError("shapes differ"))) is EngineError


# Requirements: 1.1, 1.2
def test_greedy_tokens_equal_transformers(llama, models) -> None:
    """200 prompts of mixed length, all at once: the tokens transformers.generate gives each alone."""
    found = run(llama, [generate(prompt) for prompt in prompts()], 200)

    assert [outcome.outputs["token_ids"] for outcome in found] == greedy_tokens(models, "llama")


@pytest.mark.parametrize("name", [name for name in DECODERS if name != "llama"])
def test_greedy_tokens_of_other_architectures(models, name: str) -> None:
    """The same for the other decoders."""
    model = start(models.path(name))
    try:
        found = run(model, [generate(prompt) for prompt in prompts()], 200)
    finally:
        model.close()

    assert [o.outputs["token_ids"] for o in found] == greedy_tokens(models, name)


def test_embeddings_of_real_weights(models) -> None:
    """Vectors within 1e-4 cosine distance of transformers', and every text's neighbours in the same order."""
    texts = [*SENTENCES, *(query for query, _ in QUERIES), *prompts(50)]
    model = start(embedder_path(), kinds=["embed"])
    try:
        (found,) = run(model, [embed(texts)], 1)
        check_progress(model, Kind.EMBED)
    finally:
        model.close()

    vectors = np.array(found.outputs["embeddings"])
    alone = np.array(models.answers(mean_vectors, embedder_path(), texts))
    alone = alone / np.linalg.norm(alone, axis=1, keepdims=True)
    assert (1 - (vectors * alone).sum(1)).max() < 1e-4
    known = len(texts) - 50
    mine, wanted = vectors[:known], alone[:known]
    assert (np.argsort(mine @ mine.T) == np.argsort(wanted @ wanted.T)).all()


def embed(texts: list[str]) -> InferenceRequest:
    """An embed request."""
    return InferenceRequest.parse({"model": "m", "kind": "embed", "inputs": {"texts": texts}})


def test_what_a_request_may_ask_for(llama) -> None:
    """Stop strings, a seed, log probabilities, a JSON schema, a priority, and the limits of the context."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    asked = [
        generate("hello", ignore_eos=True, max_tokens=40),
        generate("hello", logprobs=2, max_tokens=3),
        generate("hello", json_schema=schema, max_tokens=120),
        generate("hello", temperature=1.0, seed=4, ignore_eos=True),
        generate("hello", temperature=1.0, seed=4, ignore_eos=True),
        generate("x" * (CONTEXT + 1)),
        InferenceRequest.parse({**generate("hello").model_dump(), "id": "urgent", "priority": "high"}),
    ]

    free, logprobs, guided, sampled, again, too_long, urgent = run(llama, asked, len(asked))
    word = free.outputs["text"][3:5]
    (stopped,) = run(llama, [generate("hello", ignore_eos=True, max_tokens=40, stop=[word])], 1)

    assert free.outputs["finish_reason"] == "length"
    assert len(free.outputs["token_ids"]) == 40
    assert stopped.outputs["text"] == free.outputs["text"][: free.outputs["text"].index(word)]
    assert [entry["token_id"] for entry in logprobs.outputs["logprobs"]] == logprobs.outputs["token_ids"]
    for entry in logprobs.outputs["logprobs"]:
        assert entry["top"][0]["token_id"] == entry["token_id"], "greedy takes the likeliest"
        assert entry["logprob"] == entry["top"][0]["logprob"] > entry["top"][1]["logprob"]
    if guided.outputs["finish_reason"] == "stop":
        assert isinstance(json.loads(guided.outputs["text"])["a"], int)
    else:  # random weights may write blanks until there is no room left
        assert guided.outputs["text"].lstrip().startswith("{")
    assert sampled.outputs["token_ids"] == again.outputs["token_ids"] != free.outputs["token_ids"][:MAX_TOKENS]
    assert isinstance(too_long, ContextTooLong)
    assert isinstance(urgent, EngineOutput)


# Requirements: 1.3, 7.1
def test_equal_beginnings_are_read_once(llama) -> None:
    """A prompt that was seen before is found in the prefix cache, and the answer says so."""
    prompt = "the same long beginning of many requests " * 4
    run(llama, [generate(prompt)], 1)

    (found,) = run(llama, [generate(prompt)], 1)

    assert found.cache_hit
    assert found.metadata["cached_tokens"] >= 32


def test_a_tenants_prompts_are_found_by_nobody_else(llama) -> None:
    """A prompt that one tenant asked is found again by the same one, and not by another or by one without a name."""
    prompt = "something that only one of the tenants has asked " * 4

    def cached(**tenant: str) -> int:
        request = InferenceRequest.parse({**generate(prompt).model_dump(exclude={"id", "tenant"}), **tenant})
        (found,) = run(llama, [request], 1)
        return int(found.metadata.get("cached_tokens", 0))

    assert cached(tenant="acme") == 0
    assert cached(tenant="acme") >= 32
    assert cached(tenant="other") == 0
    assert cached() == 0
    assert cached() >= 32


# Requirements: 1.2
def test_a_request_can_be_taken_out(llama) -> None:
    """Abort ends a running request as cancelled, and the others go on."""
    outcomes: dict[str, object] = {}
    done = threading.Semaphore(0)

    def take(name: str, outcome: object) -> None:
        outcomes[name] = outcome
        done.release()

    for name in ("kept", "aborted"):
        request = generate("hello", max_tokens=CONTEXT, ignore_eos=True).model_copy(update={"id": name})
        llama.submit(request, lambda outcome, name=name: take(name, outcome))
    llama.abort("aborted")

    assert done.acquire(timeout=60)
    assert done.acquire(timeout=60)
    assert isinstance(outcomes["aborted"], Cancelled)
    assert isinstance(outcomes["kept"], EngineOutput)


def test_tokens_are_told_as_they_are_made(llama) -> None:
    """What a listener hears is what is answered, step by step; one that fails harms nobody."""
    check_tokens(llama)
    check_cancelled(llama)
    check_broken_listener(llama)


# Requirements: 15.1
def test_what_cannot_be_loaded_says_so(models) -> None:
    """An argument that vLLM does not have is named with the nearest; so is a kind that it does not serve."""
    with pytest.raises(EngineLoadError, match="did you mean max_num_seqs"):
        start(models.path("llama"), engine_args={"max_num_seq": 3})
    with pytest.raises(EngineLoadError, match="answers none of classify"):
        start(models.path("llama"), kinds=[Kind.CLASSIFY])


# Requirements: 1.5, 11.1
def test_tensor_parallel_and_a_killed_core(models) -> None:
    """Two processes that share the layers give the same tokens.

    SIGKILL of the engine core: what runs ends as EngineDied, the model says so, no process is left.
    """
    before = set(psutil.Process().children(recursive=True))
    model = start(models.path("llama"), tensor_parallel_size=2)
    mine = set(psutil.Process().children(recursive=True)) - before
    found = run(model, [generate(prompt) for prompt in prompts()], 200)
    assert [o.outputs["token_ids"] for o in found] == greedy_tokens(models, "llama")
    deaths: list[object] = []
    model.on_death = deaths.append
    outcomes: list[object] = []
    for number in range(64):
        request = generate(f"request {number}", max_tokens=CONTEXT, ignore_eos=True)
        model.submit(request, outcomes.append)
    core = next(process for process in mine if "EngineCore" in process.name())

    os.kill(core.pid, signal.SIGKILL)
    eventually(lambda: len(outcomes) == 64 and deaths, what="the end of the requests")

    assert all(isinstance(outcome, EngineDied | EngineOutput) for outcome in outcomes)
    assert any(isinstance(outcome, EngineDied) for outcome in outcomes)
    assert not model.alive
    model.close()
    eventually(
        lambda: not [p for p in mine if p.is_running() and p.status() != "zombie"], what="the end of its processes"
    )
