"""A model's files are data: nothing in them runs unless the model's declaration says so."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from shared.contract import InferenceRequest
from shared.errors import BadRequest, EngineLoadError
from shared.settings import ModelSpec, Settings
from tests.support.tiny_models import make_llama
from workers.engines.base import Engine
from workers.engines.common.text import TextCodec
from workers.engines.onnx.engine import OnnxEngine
from workers.engines.pytorch.engine import PyTorchEngine

CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = {kind!r}
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""

MAPS = {
    "config.json": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    "tokenizer_config.json": {"AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]},
}


@pytest.fixture(autouse=True)
def _modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers would copy a model's code to."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def folder_with_code(folder: Path, kind: str, marker: Path) -> Path:
    """A model whose configuration and tokenizer point to a Python file that leaves a marker."""
    make_llama(folder, num_hidden_layers=1)
    (folder / "code.py").write_text(CODE.format(marker=str(marker), kind=kind))
    for name, auto_map in MAPS.items():
        data = json.loads((folder / name).read_text())
        data["auto_map"] = auto_map
        if name == "config.json":
            data["model_type"] = kind
        (folder / name).write_text(json.dumps(data))
    return folder


def engine_of(kind: type[Engine], tmp_path: Path) -> Engine:
    """An engine that keeps its conversions here."""
    return kind(Settings.model_validate({"models": {"cache_dir": str(tmp_path / "cache")}}))


def declared(path: Path, **more: object) -> ModelSpec:
    """A declaration."""
    return ModelSpec.model_validate({"name": "m", "path": str(path), "kinds": ["generate"], **more})


@pytest.mark.parametrize("engine", [PyTorchEngine, OnnxEngine])
def test_a_models_code_is_not_run(tmp_path: Path, engine: type[Engine]) -> None:
    """An architecture that transformers knows is loaded from transformers; one that only the code knows is refused."""
    marker = tmp_path / "ran"
    known = folder_with_code(tmp_path / "known", "llama", marker)
    unknown = folder_with_code(tmp_path / "unknown", "mystery", marker)

    engine_of(engine, tmp_path).load(declared(known)).close()
    with pytest.raises(EngineLoadError):
        engine_of(engine, tmp_path).load(declared(unknown))

    assert not marker.exists()


def test_it_runs_where_the_declaration_says_so(tmp_path: Path) -> None:
    """With trust_remote_code the same files do run: what the test above looks for can be found."""
    marker = tmp_path / "ran"
    spec = declared(folder_with_code(tmp_path / "trusted", "mystery", marker), trust_remote_code=True)

    engine_of(PyTorchEngine, tmp_path).load(spec).close()

    assert marker.exists()


def test_pickled_weights_are_data(tmp_path: Path) -> None:
    """Weights in PyTorch's old format are read as tensors; a pickle that calls something is refused."""
    marker, folder = tmp_path / "ran", make_llama(tmp_path / "model")

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (marker,)

    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Evil()}, folder / "pytorch_model.bin", pickle_module=pickle)

    with pytest.raises(EngineLoadError, match="more than tensors"):
        engine_of(PyTorchEngine, tmp_path).load(declared(folder))
    assert not marker.exists()


def test_a_chat_template_is_in_a_sandbox(tmp_path: Path) -> None:
    """A template of the model's that reaches for Python's insides is refused as the request's error."""
    folder = make_llama(tmp_path / "model")
    path = folder / "tokenizer_config.json"
    reach = "{{ messages.__class__.__mro__[1].__subclasses__() }}{{ ''.__class__.__base__.__subclasses__() }}"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": reach}))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    request = InferenceRequest.parse(
        {"model": "m", "kind": "chat", "inputs": {"messages": [{"role": "user", "content": "x"}]}}
    )

    with pytest.raises(BadRequest, match="unsafe"):
        TextCodec(declared(folder), 64).prompts(request)
