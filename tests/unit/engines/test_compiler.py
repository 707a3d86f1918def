"""torch.compile: kept by id, chosen by load, and never in the way of serving."""

from __future__ import annotations

import logging
import shutil

import pytest
import torch

from shared.contract import InferenceRequest
from shared.settings import ModelSpec, PyTorchSettings, Settings
from workers.engines.pytorch.compiler import ModelCompiler
from workers.engines.pytorch.engine import PyTorchEngine


class Doubling(torch.nn.Module):
    """A model as small as can be."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.dim() == 1 else x @ x


def refusing(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> None:
    """A backend that cannot compile anything."""
    raise RuntimeError("no kernel for this")


@pytest.mark.parametrize(
    ("load", "mode"),
    [(0.0, "default"), (0.29, "default"), (0.3, "reduce-overhead"), (0.8, "reduce-overhead"), (0.81, "max-autotune")],
)
def test_the_load_chooses_the_mode(load: float, mode: str) -> None:
    """Busy: the longest search; idle: the shortest; between the two: what is configured."""
    assert ModelCompiler(PyTorchSettings(compile_mode="reduce-overhead")).mode_for(load) == mode


def test_the_thresholds_must_rise() -> None:
    """A low above the high is refused with both."""
    with pytest.raises(ValueError, match=r"compile_load_low \(0.9\) is above compile_load_high \(0.8\)"):
        PyTorchSettings(compile_load_low=0.9)


def test_a_failing_compilation_serves_uncompiled(caplog) -> None:
    """The first run fails to compile: it is answered by the model as it is, said once, and not tried again."""
    compiler = ModelCompiler(PyTorchSettings(), backend=refusing)
    with caplog.at_level(logging.WARNING, "workers.engines.pytorch.compiler"):
        model = compiler.compile_model(Doubling(), "m")
        answers = [model(torch.tensor([1.0, 2.0])).tolist() for _ in range(3)]

    assert answers == [[2.0, 4.0]] * 3
    assert model.failed is not None
    assert caplog.text.count("m runs uncompiled") == 1
    assert "no kernel for this" in caplog.text


def test_an_error_of_the_inputs_is_not_the_compilers() -> None:
    """What fails uncompiled as well is raised as it is, and the compiled model stays."""
    model = ModelCompiler(PyTorchSettings(), backend="eager").compile_model(Doubling(), "m")

    with pytest.raises(RuntimeError):
        model(torch.ones(2, 3))

    assert model.failed is None
    assert model(torch.tensor([1.0])).tolist() == [2.0]


def test_compiled_models_are_kept_by_id() -> None:
    """One can be asked for, compiled again for another load, and let go."""
    compiler = ModelCompiler(PyTorchSettings(), backend="eager")
    first = compiler.compile_model(Doubling(), "m")

    assert compiler.get_compiled_model("m") is first
    again = compiler.recompile("m", load=0.9)
    assert again is not first
    assert (again.model, again.mode) == (first.model, "max-autotune")
    assert compiler.get_compiled_model("m") is again
    compiler.forget("m")
    assert compiler.get_compiled_model("m") is None
    with pytest.raises(KeyError):
        compiler.recompile("m")


def answers(engine: PyTorchEngine, spec: ModelSpec, count: int) -> list[list[int]]:
    """Greedy tokens of a few prompts, run together."""
    model = engine.load(spec)
    found: dict[int, list[int]] = {}
    requests = [
        InferenceRequest.parse({"model": "m", "inputs": {"prompt": "ab" * n}, "params": {"max_tokens": 2 + n}})
        for n in range(1, count + 1)
    ]
    model.infer(requests, lambda index, outcome: found.update({index: outcome.outputs["token_ids"]}))
    model.close()
    return [found[index] for index in range(count)]


def engine(**configured: object) -> PyTorchEngine:
    """A PyTorch engine with these settings."""
    return PyTorchEngine(Settings.model_validate({"optimization": {"pytorch": configured}}))


def test_a_decoder_goes_on_when_compiling_fails(models, monkeypatch) -> None:
    """The tokens are those of the uncompiled engine."""
    spec = ModelSpec(name="llama", path=str(models.path("llama")), kinds=("generate",))
    broken = engine(compile=True)
    monkeypatch.setattr(broken.compiler, "_backend", refusing)

    assert answers(broken, spec, 3) == answers(engine(), spec, 3)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler (g++)")
def test_a_compiled_model_answers_like_the_other() -> None:
    """Really compiled to machine code, and run with two sizes of input."""
    torch.manual_seed(3)
    plain = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 2)).eval()
    compiled = ModelCompiler(PyTorchSettings()).compile_model(plain, "m")

    with torch.inference_mode():
        for rows in (3, 5):
            inputs = torch.randn(rows, 4)
            assert torch.allclose(compiled(inputs), plain(inputs), atol=1e-6)
    assert compiled.failed is None
