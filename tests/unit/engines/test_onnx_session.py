"""Execution providers: their options, and those that do not work are passed over."""

from __future__ import annotations

import logging
from pathlib import Path

import onnxruntime
import pytest

from shared.errors import EngineLoadError
from shared.settings import ModelSpec, Settings
from workers.engines.onnx.session import CPU, CUDA, OPENVINO, TENSORRT, open_session, provider_options

SPEC = ModelSpec(name="m", path="m")


def settings(cache: Path, *providers: str) -> Settings:
    """Settings with these providers."""
    return Settings.model_validate(
        {"models": {"cache_dir": str(cache)}, "optimization": {"onnx": {"execution_providers": providers}}}
    )


def test_every_provider_has_its_options(tmp_path: Path) -> None:
    """TensorRT keeps its engines beside the conversions; OpenVINO runs on the device that the model names."""
    configured = settings(tmp_path, CPU)
    elsewhere = SPEC.model_copy(update={"options": {"onnx": {"openvino_device": "AUTO:GPU,CPU"}}})

    assert provider_options(TENSORRT, configured, SPEC)["trt_engine_cache_path"] == str(tmp_path / "onnx" / "tensorrt")
    assert provider_options(OPENVINO, configured, SPEC) == {"device_type": "CPU"}
    assert provider_options(OPENVINO, configured, elsewhere) == {"device_type": "AUTO:GPU,CPU"}
    assert provider_options(CUDA, configured, SPEC) == {"arena_extend_strategy": "kSameAsRequested"}
    assert provider_options(CPU, configured, SPEC) == {}


# Requirements: 3.3
def test_a_provider_that_does_not_start_is_passed_over(tmp_path, monkeypatch, caplog) -> None:
    """The next one runs the model, and a line says which was passed over and why."""
    asked: list[list[str]] = []

    class Session:
        def __init__(self, graph: str, options: object, providers: list[tuple[str, dict[str, str]]]) -> None:
            self.names = [name for name, _ in providers]
            asked.append(self.names)
            if TENSORRT in self.names:
                raise RuntimeError("libnvinfer.so.10: cannot open shared object file")

        def get_providers(self) -> list[str]:
            return [name for name in self.names if name != CUDA]

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)

    with caplog.at_level(logging.INFO):
        open_session(tmp_path / "g.onnx", settings(tmp_path, TENSORRT, CUDA, OPENVINO, CPU), SPEC)

    assert asked == [[TENSORRT, CUDA, CPU], [CUDA, CPU]]
    assert "OpenVINOExecutionProvider not installed" in caplog.text
    assert "TensorrtExecutionProvider does not start for m and is passed over: libnvinfer.so.10" in caplog.text
    assert "CUDAExecutionProvider is installed but does not start here; running on CPUExecutionProvider" in caplog.text
    assert (tmp_path / "onnx" / "tensorrt").is_dir()


def test_a_graph_that_no_provider_opens_is_a_load_error(tmp_path) -> None:
    """The last provider's error is the load's."""
    (tmp_path / "g.onnx").write_bytes(b"not a graph")

    with pytest.raises(EngineLoadError, match="cannot open 'm' with CPUExecutionProvider"):
        open_session(tmp_path / "g.onnx", settings(tmp_path, CPU), SPEC)
