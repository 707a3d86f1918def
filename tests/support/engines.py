"""How the tests of engines ask a loaded model: texts, requests, batches."""

from __future__ import annotations

import random
from importlib.util import find_spec

import pytest

from shared.contract import InferenceRequest
from shared.errors import FleetError
from tests.support.models import Models
from tests.support.tiny_models import greedy_reference
from workers.engines.base import EngineOutput, LoadedModel

PROMPTS = 200
MAX_TOKENS = 12
DECODERS = ("llama", "qwen", "gpt2")
ENGINES = (
    "pytorch",
    "onnx",
    pytest.param(
        "deepspeed", marks=pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
    ),
)


def prompts(count: int = PROMPTS) -> list[str]:
    """Texts of mixed length."""
    rng = random.Random(4)
    return [
        "".join(rng.choice("abcdefghij klmnop.éß你") for _ in range(rng.choice((1, 3, 9, 30, 60))))
        for _ in range(count)
    ]


def greedy_tokens(models: Models, name: str) -> list[list[int]]:
    """What transformers.generate gives for each of the prompts alone, MAX_TOKENS at most."""
    found: list[list[int]] = models.answers(greedy_reference, models.path(name), prompts(), MAX_TOKENS)
    return found


def run(model: LoadedModel, requests: list[InferenceRequest], size: int) -> list[EngineOutput | FleetError]:
    """The outcomes of requests that are run in batches of ``size``."""
    out: dict[int, EngineOutput | FleetError] = {}
    for first in range(0, len(requests), size):

        def emit(index: int, outcome: EngineOutput | FleetError, first: int = first) -> None:
            assert first + index not in out, "a member is answered once"
            out[first + index] = outcome

        model.infer(requests[first : first + size], emit)
    return [out[index] for index in range(len(requests))]


def generate(prompt: str, **params: object) -> InferenceRequest:
    """A generate request."""
    return InferenceRequest.parse(
        {"model": "m", "inputs": {"prompt": prompt}, "params": {"max_tokens": MAX_TOKENS, **params}}
    )
