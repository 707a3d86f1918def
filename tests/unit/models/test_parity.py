"""What counts as the same answer, and what becomes of an engine that gives another."""

from __future__ import annotations

from pathlib import Path

import pytest
import redis

from shared.contract import EngineName, Kind
from shared.errors import EngineDisagrees
from shared.settings import ModelSpec, ParitySettings, Settings
from workers.engines.base import Emit, EngineOutput, LoadedModel
from workers.models.parity import ParityGate, agreement, questions


def test_tokens_agree_up_to_the_first_that_differs() -> None:
    """The share is the mean over the questions; one that only one side refused counts as none."""
    assert agreement([{"token_ids": [1, 2, 3, 4]}], [{"token_ids": [1, 2, 3, 4]}]) == (1.0, 0.0)
    assert agreement([{"token_ids": [1, 2, 9, 4]}, None], [{"token_ids": [1, 2, 3, 4]}, None]) == (0.5, 0.0)
    assert agreement([{"token_ids": []}, None], [{"token_ids": []}, {"token_ids": [1]}]) == (0.5, 0.0)
    assert agreement([{"token_ids": [[1], [2, 3]]}], [{"token_ids": [[1], [2, 4]]}])[0] == pytest.approx(2 / 3)


def test_distances_of_vectors_and_scores() -> None:
    """Vectors by their angle, scores by their difference."""
    assert agreement([{"embeddings": [[1.0, 0.0]]}], [{"embeddings": [[0.0, 2.0]]}]) == (1.0, 1.0)
    assert agreement([{"scores": [[0.1, 0.9]]}], [{"scores": [[0.2, 0.8]]}])[1] == pytest.approx(0.1)


@pytest.mark.parametrize("kind", list(Kind))
def test_every_kind_has_questions(kind: Kind) -> None:
    """A model of any kind can be asked."""
    spec = ModelSpec(name="m", path="x", kinds=(kind,))

    asked = questions(spec, frozenset({kind}), ParitySettings())

    assert len({request.inputs for request in asked}) == 8
    assert {request.kind for request in asked} == {kind}


class Parrot(LoadedModel):
    """Answers every question with the same tokens."""

    def __init__(self, path: Path, *tokens: int) -> None:
        self.spec = ModelSpec(name="parrot", path=str(path), kinds=(Kind.GENERATE,))
        self.kinds = frozenset({Kind.GENERATE})
        self._tokens = list(tokens)

    def infer(self, requests, emit: Emit) -> None:
        for index in range(len(requests)):
            emit(index, EngineOutput({"token_ids": self._tokens}))


# Requirements: 3.2
def test_an_engine_that_disagrees_is_refused(tmp_path: Path, redis_client: redis.Redis) -> None:
    """PyTorch's answers are the reference, also for workers elsewhere; one that says other things must not serve."""
    model = tmp_path / "model"
    model.mkdir()
    settings = Settings.model_validate({"models": {"cache_dir": str(tmp_path / "cache")}})
    elsewhere = Settings.model_validate({"models": {"cache_dir": str(tmp_path / "other")}})

    assert ParityGate(EngineName.PYTORCH, settings, redis_client)(Parrot(model, 1, 2, 3)) == "reference"
    assert "agrees: 100.0% of tokens" in ParityGate(EngineName.ONNX, elsewhere, redis_client)(Parrot(model, 1, 2, 3))
    with pytest.raises(EngineDisagrees, match=r"66\.7% of tokens"):
        ParityGate(EngineName.VLLM, settings, redis_client)(Parrot(model, 1, 2, 4))


def test_what_cannot_be_checked(tmp_path: Path, redis_client: redis.Redis) -> None:
    """Without a reference a model serves unchecked, or not at all where checking is required."""
    base = {"models": {"cache_dir": str(tmp_path)}}
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "model.safetensors").write_bytes(bytes(2 * 10**6))
    lenient = Settings.model_validate({**base, "optimization": {"parity": {"max_reference_mb": 1}}})
    strict = Settings.model_validate({**base, "optimization": {"parity": {"required": True}}})

    assert "unchecked: no worker with the PyTorch engine has answered yet, and 2 MB" in ParityGate(
        EngineName.ONNX, lenient, redis_client
    )(Parrot(tmp_path / "large", 1))
    with pytest.raises(EngineDisagrees, match="cannot be checked.*PyTorch cannot be asked"):
        ParityGate(EngineName.ONNX, strict, redis_client)(Parrot(tmp_path / "nothing", 1))
