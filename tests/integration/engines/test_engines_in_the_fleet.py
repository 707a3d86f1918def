"""Real models on real engines through the queues: right answers, hops, model management, Flower."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from producer import InferenceResult
from shared.embedded import free_port
from shared.errors import ContextTooLong, EngineError
from tests.support.engines import greedy_tokens, prompts
from tests.support.fleet import ROOT, FleetUnderTest
from tests.support.models import Models
from tests.support.requests import ECHO
from tests.support.tiny_models import CONTEXT, mean_vectors
from tests.support.waiting import eventually

MAX_TOKENS = 8

pytestmark = pytest.mark.timeout(900)


def configuration(models: Models, **changes: object) -> dict[str, object]:
    """A fleet that serves the tiny models on both engines."""
    return {
        "optimization": {"engine_preference": ["onnx", "pytorch"], **changes},
        "models": {
            "cache_dir": str(models.cache),
            "catalog": {
                "llama": {"path": str(models.path("llama")), "kinds": ["generate", "chat"]},
                "shallow": {"path": str(models.path("shallow")), "kinds": ["generate"]},
                "qwen": {"path": str(models.path("qwen")), "kinds": ["generate"]},
                "bert": {"path": str(models.path("bert")), "kinds": ["embed"]},
            },
        },
        "monitoring": {"server": {"preload_models": ["llama"]}},
    }


@pytest.fixture(scope="module")
def reference(models: Models) -> dict[str, list[list[int]]]:
    """Greedy tokens of transformers.generate, each prompt alone."""
    return {name: [row[:MAX_TOKENS] for row in greedy_tokens(models, name)] for name in ("llama", "qwen")}


# Requirements: 3.1, 6.6
@pytest.mark.parametrize("batching", [True, False], ids=["batched", "unbatched"])
def test_two_hundred_prompts_equal_transformers_on_both_engines(make_fleet, models, reference, batching: bool) -> None:
    """Greedy tokens through the fleet, two architectures, are those of transformers.generate of each prompt alone."""
    fleet = make_fleet(configuration(models, batcher={"enabled": batching}))
    for name in reference:
        models.convert(fleet.settings.models.catalog[name])
    worker = fleet.start_worker("onnx,pytorch")

    for engine in ("onnx", "pytorch"):
        for name, expected in reference.items():
            results = list(
                fleet.client.map(
                    {
                        "model": name, "inputs": {"prompt": prompt}, "params": {"max_tokens": MAX_TOKENS},
                        "engine_preference": engine,
                    }
                    for prompt in prompts()
                )
            )  # fmt: skip

            assert [result.outputs["token_ids"] for result in results] == expected
            assert {result.engine_used for result in results} == {engine}, fleet.log(worker)[-4000:]
            largest = max(result.batch_size for result in results)
            assert largest > 8 if batching else largest == 1


def test_embeddings_through_the_fleet_equal_transformers(make_fleet, models: Models) -> None:
    """Vectors of 200 texts, micro-batched on both engines, are within 1e-4 cosine distance of each text's alone."""
    fleet = make_fleet(configuration(models))
    for name in ("llama", "bert"):
        models.convert(fleet.settings.models.catalog[name])
    fleet.start_worker("onnx,pytorch")
    alone = np.array(models.answers(mean_vectors, models.path("bert"), prompts()))

    for engine in ("onnx", "pytorch"):
        results = fleet.client.map(
            [
                {"model": "bert", "kind": "embed", "inputs": {"texts": [text]}, "engine_preference": engine}
                for text in prompts()
            ]
        )
        vectors = np.array([result.outputs["embeddings"][0] for result in results])

        cosine = (vectors * alone).sum(1) / np.linalg.norm(alone, axis=1) / np.linalg.norm(vectors, axis=1)
        assert (1 - cosine).max() < 1e-4


# Requirements: 3.5, 15.3
def test_a_failed_conversion_lets_pytorch_serve(make_fleet, models: Models, tmp_path: Path) -> None:
    """When ONNX's conversion does not validate, the request goes on to PyTorch, with the reason in its history."""
    config = configuration(models, onnx={"validation_tolerance": 1e-12})
    config["models"]["cache_dir"] = str(tmp_path / "cache")
    config["monitoring"] = {}
    fleet = make_fleet(config)
    onnx = fleet.start_worker("onnx")
    fleet.start_worker("pytorch")

    first = fleet.client.submit(model="shallow", inputs={"prompt": "abc"}, params={"max_tokens": 4}).result(120)

    assert first.engine_used == "pytorch"
    (hop,) = first.metadata["hops"]
    assert hop["engine"] == "onnx"
    assert "deviates from the original" in hop["error"]
    eventually(
        lambda: all("shallow" not in e.models for w in fleet.client.fleet() for e in w.engines if e.name == "onnx"),
        what="the registry's news that onnx cannot serve it",
    )
    second = fleet.client.submit(model="shallow", inputs={"prompt": "abc"}, params={"max_tokens": 4}).result(60)
    assert (second.engine_used, second.metadata["hops"]) == ("pytorch", [])
    assert "deviates from the original" in fleet.log(onnx)


# Requirements: 1.6
def test_when_every_engine_fails_the_caller_gets_the_history(make_fleet, models: Models, tmp_path: Path) -> None:
    """No engine left: one error that says what each of them said."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "llama"}')
    config = configuration(models)
    config["models"]["catalog"]["broken"] = {"path": str(broken), "kinds": ["generate"]}
    config["monitoring"] = {}
    fleet = make_fleet(config)
    fleet.start_worker("onnx,pytorch")

    with pytest.raises(EngineError, match=r"no engine could serve the request.*onnx: .*pytorch: "):
        fleet.client.submit(model="broken", inputs={"prompt": "abc"}).result(60)


# Requirements: 13.3
def test_fallback_can_be_switched_off(make_fleet, models: Models, tmp_path: Path) -> None:
    """With fallback_on_error off the first engine's error is the caller's."""
    config = configuration(models, onnx={"validation_tolerance": 1e-12}, fallback_on_error=False)
    config["models"]["cache_dir"] = str(tmp_path / "cache")
    config["monitoring"] = {}
    fleet = make_fleet(config)
    fleet.start_worker("onnx,pytorch")

    with pytest.raises(EngineError, match="deviates"):
        fleet.client.submit(model="shallow", inputs={"prompt": "abc"}).result(120)


def test_a_prompt_beyond_the_context_never_hops(make_fleet, models: Models) -> None:
    """It is the caller's error, said once, while those beside it are answered."""
    fleet = make_fleet(configuration(models))
    fleet.start_worker("onnx,pytorch")
    texts = ["fine", "x" * (2 * CONTEXT), "also fine"]

    handles = fleet.client.submit_many(
        [{"model": "llama", "inputs": {"prompt": text}, "params": {"max_tokens": 4}} for text in texts]
    )
    outcomes = [handle.outcome(60) for handle in handles]

    assert [type(outcome) for outcome in outcomes] == [InferenceResult, ContextTooLong, InferenceResult]
    assert {o.engine_used for o in outcomes if isinstance(o, InferenceResult)} == {"onnx"}


def test_least_recently_used_model_is_unloaded(make_fleet, models: Models) -> None:
    """Past max_cached the model used longest ago goes; loads and unloads are logged; all still answer."""
    config = configuration(models)
    config["models"]["max_cached"] = 1
    fleet = make_fleet(config)
    worker = fleet.start_worker("pytorch")

    for _ in range(2):
        assert fleet.client.submit(model="llama", inputs={"prompt": "a"}, engine_preference="pytorch").result(60)
        vectors = fleet.client.submit(
            model="bert", kind="embed", inputs={"texts": ["a", "b"]}, engine_preference="pytorch"
        )
        assert len(vectors.result(60).outputs["embeddings"]) == 2

    log = fleet.log(worker)
    assert log.count("unload of llama") == 2
    assert "max_cached (1) reached" in log


def test_an_engine_that_cannot_run_says_how_to_mend_it(make_fleet) -> None:
    """A worker for an engine that is switched off ends with one clear line."""
    fleet = make_fleet(optimization={"fake": {"enabled": False}})
    off = fleet.start_worker("fake", wait=False)

    assert off.wait(60) != 0
    assert "optimization.fake.enabled" in fleet.log(off)
    assert "Traceback" not in fleet.log(off)


def test_flower_shows_each_request_as_a_task(fleet: FleetUnderTest) -> None:
    """Flower on the same broker lists every request with state, runtime and retries, to those with the password."""
    port = free_port()
    log = (fleet.folder / "flower.log").open("wb")
    flower = subprocess.Popen(
        [sys.executable, "-m", "celery", "-A", "workers", "flower", "--address=127.0.0.1", f"--port={port}"], cwd=ROOT,
        env={**fleet.environ, "FLOWER_BASIC_AUTH": "user:pass"}, stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip
    fleet.processes.append(flower)

    def ask(path: str, auth: str = "user:pass") -> dict[str, dict[str, object]] | int:
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}")
        request.add_header("Authorization", "Basic " + base64.b64encode(auth.encode()).decode())
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def workers_seen() -> bool:
        seen = ask("/api/workers?refresh=1")
        return isinstance(seen, dict) and bool(seen)

    eventually(workers_seen, 40, "Flower's sight of the worker")
    good = [handle.id for handle in fleet.client.submit_many([ECHO] * 20)]
    bad = fleet.client.submit(model="echo", inputs={"prompt": "!bad"})
    bad.outcome(10)

    def all_there() -> dict[str, dict[str, object]] | None:
        tasks = ask("/api/tasks")
        ended = isinstance(tasks, dict) and {t for t, task in tasks.items() if task["state"] in ("SUCCESS", "FAILURE")}
        return tasks if ended and ended >= {*good, bad.id} else None

    tasks = eventually(all_there, what="all tasks in Flower")
    assert {tasks[task]["state"] for task in good} == {"SUCCESS"}
    assert all(tasks[task]["runtime"] is not None and tasks[task]["retries"] == 0 for task in good)
    assert tasks[bad.id]["state"] == "FAILURE"
    assert "hello" not in json.dumps(tasks)
    assert ask("/api/tasks", auth="user:wrong") == 401
    os.kill(flower.pid, 15)
    assert flower.wait(20) == 0
