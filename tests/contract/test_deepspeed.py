"""Models over several processes: the answers of transformers, and one end for all processes of a model."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from shared.contract import InferenceRequest
from shared.errors import ConfigurationError, EngineDied, EngineError, EngineLoadError, EngineOutOfMemory
from shared.settings import ModelSpec, Settings
from tests.contract.told import check_cancelled, check_tokens
from tests.support.engines import generate, greedy_tokens, prompts, run
from tests.support.fleet import ROOT
from tests.support.models import Models
from tests.support.tiny_models import mean_vectors
from tests.support.waiting import eventually
from workers.engines.base import EngineOutput
from workers.engines.deepspeed.engine import DeepSpeedEngine, DeepSpeedModel

pytest.importorskip("deepspeed", reason="deepspeed is not installed")

SHAPES = {
    "tp2": {"tensor_parallel": 2},
    "pp2": {"pipeline_parallel": 2},
    "zero": {"zero_offload": "cpu", "rank_timeout_seconds": 4},
}
Load = Callable[[str, str], DeepSpeedModel]

pytestmark = pytest.mark.timeout(300)


def spec_of(name: str, path: Path, options: dict[str, object]) -> ModelSpec:
    """A model of the catalogue with options for this engine."""
    kinds = ["embed"] if name == "bert" else ["generate", "chat"]
    data = {"name": name, "path": str(path), "kinds": kinds, "options": {"deepspeed": options}}
    return ModelSpec.model_validate(data)


@pytest.fixture(scope="module")
def load(models: Models) -> Iterator[Load]:
    """Loads a model in a shape, once for as long as it lives. Tests that kill come last in this file."""
    kept: dict[tuple[str, str], DeepSpeedModel] = {}

    def load(name: str, shape: str) -> DeepSpeedModel:
        if (name, shape) not in kept or not kept[name, shape].alive:
            model = DeepSpeedEngine(Settings()).load(spec_of(name, models.path(name), SHAPES[shape]))
            model.warmup()
            kept[name, shape] = model
        return kept[name, shape]

    yield load
    for model in kept.values():
        model.close()


def gone(pids: list[int]) -> bool:
    """Whether none of the processes is there."""
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids)


def long_request(tokens: int = 200) -> InferenceRequest:
    """A request that takes a while."""
    return generate("abc", max_tokens=tokens, ignore_eos=True)


# Requirements: 2.1, 2.2, 2.3, 11.1, 11.2
@pytest.mark.parametrize(
    ("name", "shape"), [("llama", "tp2"), ("qwen", "tp2"), ("llama", "pp2"), ("qwen", "pp2"), ("llama", "zero")]
)
def test_greedy_tokens_equal_transformers(load: Load, models, name: str, shape: str) -> None:
    """200 prompts of mixed length in batches, over two processes: the tokens transformers gives each alone."""
    found = run(load(name, shape), [generate(prompt) for prompt in prompts()], 64)

    assert [outcome.outputs["token_ids"] for outcome in found] == greedy_tokens(models, name)


# Requirements: 2.2
def test_embeddings_over_two_processes_equal_transformers(load: Load, models) -> None:
    """BERT with its heads over two processes: within 1e-4 cosine distance of transformers on each text alone."""
    texts = prompts(60)
    request = InferenceRequest.parse({"model": "m", "kind": "embed", "inputs": {"texts": texts}})
    model = load("bert", "tp2")

    (outcome,) = run(model, [request], 1)
    model.close()

    vectors = np.array(outcome.outputs["embeddings"])
    alone = np.array(models.answers(mean_vectors, models.path("bert"), texts))
    cosine = (vectors * alone).sum(1) / np.linalg.norm(alone, axis=1) / np.linalg.norm(vectors, axis=1)
    assert (1 - cosine).max() < 1e-4


def test_sampling_over_stages_is_that_of_one_process(load: Load) -> None:
    """The last stage's scores reach the sampler: a seeded request gives the same tokens in a pipeline as without."""
    sampled = [generate("abc", temperature=1.5, top_p=0.9, top_k=50, seed=seed) for seed in range(5)]

    whole = run(load("llama", "zero"), sampled, 5)
    staged = run(load("llama", "pp2"), sampled, 5)

    assert [outcome.outputs["token_ids"] for outcome in staged] == [outcome.outputs["token_ids"] for outcome in whole]


@pytest.mark.parametrize("shape", ["tp2", "pp2"])
def test_tokens_are_told_as_they_are_made(load: Load, shape: str) -> None:
    """Over several processes too; a pipeline gathers those of its micro-batches."""
    model = load("llama", shape)

    check_tokens(model)
    check_cancelled(model)


def test_the_worker_does_not_import_torch() -> None:
    """What runs in the worker leaves torch and DeepSpeed to the model's processes."""
    code = (
        "import sys, workers.engines.deepspeed.engine; sys.exit('torch' in sys.modules or 'deepspeed' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# Requirements: 2.5
@pytest.mark.parametrize(
    ("name", "options", "error", "text"),
    [
        ("llama", {"tensor_parallel": 4}, EngineLoadError, "does not divide the 2 key-value heads of 'llama'"),
        ("llama", {"tensor_parallel": 3}, EngineLoadError, "does not divide the 4 attention heads of 'llama'"),
        ("llama", {"pipeline_parallel": 4}, EngineLoadError, "more than the 3 layers of 'llama'"),
        ("bert", {"pipeline_parallel": 2}, EngineLoadError, "for models that generate"),
        ("llama", {"tensor_parallel": 2, "zero_offload": "cpu"}, ConfigurationError, "set tensor_parallel and pipe"),
        ("llama", {"zero_offload": "nvme"}, ConfigurationError, "nvme_path is not set"),
        ("llama", {"tensor_paralel": 2}, ConfigurationError, "options.deepspeed.tensor_paralel"),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(models, name: str, options, error, text: str) -> None:
    """A shape that the model does not have fails the load at once, with what to change."""
    children = psutil.Process().children()

    with pytest.raises(error, match=text):
        DeepSpeedEngine(Settings()).load(spec_of(name, models.path(name), options))

    assert psutil.Process().children() == children


# --- the end of a group -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "shape", "victim"), [("llama", "tp2", 1), ("llama", "pp2", 0)])
def test_a_rank_killed_amid_a_batch_ends_the_group(load: Load, name: str, shape: str, victim: int) -> None:
    """SIGKILL while tokens are made: the members without an answer fail for it, and no process is left.

    What they are told is how the rank ended, not that there was no progress for as long as is waited for that.
    """
    model = load(name, shape)
    pids, answered, struck = model.group.pids, [], []

    def kill(index: int, outcome: object) -> None:
        answered.append(index)
        if not struck:
            struck.append(index)
            threading.Timer(0.02, os.kill, (pids[victim], signal.SIGKILL)).start()

    with pytest.raises(EngineDied, match=rf"rank {victim} of 2 .*'{name}' was killed by SIGKILL"):
        model.infer([generate("x", max_tokens=1), *[long_request() for _ in range(5)]], kill)

    assert answered == [0]
    assert not model.alive
    assert gone(pids)
    with pytest.raises(EngineDied, match=f"rank {victim} of 2"):
        model.infer([long_request()], kill)


def test_a_rank_killed_while_idle_ends_the_group(load: Load) -> None:
    """The other rank ends by itself, and the next batch fails at once instead of waiting."""
    model = load("qwen", "pp2")
    pids = model.group.pids

    os.kill(pids[1], signal.SIGKILL)

    eventually(lambda: gone(pids) and not model.alive, what="the end of both ranks")
    with pytest.raises(EngineDied, match="rank 1 of 2"):
        model.infer([long_request()], lambda index, outcome: None)


def test_out_of_memory_in_one_of_two_ranks(load: Load) -> None:
    """The batch failed for memory, so that a smaller one is tried; the ranks are not in step any more and end."""
    model = load("qwen", "tp2")
    pids = model.group.pids
    limit_memory(pids[1], 30)

    with pytest.raises(EngineOutOfMemory):
        model.infer([generate("x" * 200)] * 256, lambda index, outcome: None)

    assert not model.alive
    assert gone(pids)


def test_out_of_memory_in_a_single_process_leaves_it_running(load: Load) -> None:
    """The same process answers the next batch."""
    model = load("llama", "zero")
    limit_memory(model.group.pids[0], 30)

    with pytest.raises(EngineOutOfMemory):
        model.infer([generate("x" * 200)] * 256, lambda index, outcome: None)

    limit_memory(model.group.pids[0], None)
    assert model.alive
    assert isinstance(run(model, [generate("abc")], 1)[0], EngineOutput)


def test_a_process_that_hangs_is_killed(load: Load) -> None:
    """One that shows no progress for rank_timeout_seconds counts as dead."""
    model = load("llama", "zero")
    os.kill(model.group.pids[0], signal.SIGSTOP)

    with pytest.raises(EngineDied, match="no progress for 4 s"):
        model.infer([long_request()], lambda index, outcome: None)

    assert gone(model.group.pids)


def test_the_processes_do_not_outlive_the_worker(models) -> None:
    """When the worker is killed while they load, they end."""
    plan = spec_of("llama", models.path("llama"), SHAPES["tp2"]).model_dump(mode="json")
    code = (
        "from shared.settings import ModelSpec, Settings\n"
        "from workers.engines.deepspeed.engine import DeepSpeedEngine\n"
        f"DeepSpeedEngine(Settings()).load(ModelSpec.model_validate({plan!r}))\n"
    )
    worker = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    ranks = eventually(lambda: len(found := psutil.Process(worker.pid).children()) == 2 and found, 30, "two ranks")
    eventually(
        lambda: all("libtorch" in Path(f"/proc/{rank.pid}/maps").read_text() for rank in ranks), 60, "torch in both"
    )

    worker.kill()
    worker.wait()

    eventually(lambda: gone([rank.pid for rank in ranks]), what="the end of the ranks")


# Requirements: 2.5
def test_a_rank_killed_while_loading_fails_the_load(models) -> None:
    """The load ends with the rank's name at once, not after a timeout."""
    failed: list[BaseException] = []

    def load() -> None:
        try:
            DeepSpeedEngine(Settings()).load(spec_of("llama", models.path("llama"), SHAPES["tp2"]))
        except EngineError as error:
            failed.append(error)

    before = psutil.Process().children()
    thread = threading.Thread(target=load)
    thread.start()
    ranks = eventually(lambda: len(new := [c for c in psutil.Process().children() if c not in before]) == 2 and new)
    max(ranks, key=lambda rank: rank.pid).kill()
    thread.join(5)

    assert isinstance(failed[0], EngineLoadError)
    assert "was killed by SIGKILL" in str(failed[0])
    assert gone([rank.pid for rank in ranks])


def limit_memory(pid: int, more_mb: int | None) -> None:
    """Let a process have ``more_mb`` more than it has; ``None`` is no limit."""
    limit = resource.RLIM_INFINITY if more_mb is None else psutil.Process(pid).memory_info().vms + more_mb * 2**20
    resource.prlimit(pid, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
