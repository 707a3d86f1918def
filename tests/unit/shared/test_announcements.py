"""Announcements of workers of another release."""

from __future__ import annotations

from shared.contract import EngineName, Kind
from shared.features import Feature
from shared.registry import AFTER_0_1_0, EngineInfo, ServedModel, WorkerInfo


def test_what_a_newer_worker_announces_is_read_as_far_as_it_is_known() -> None:
    """Fields, kinds, features and engines that nobody here has heard of are passed over; the rest counts."""
    model = {"kinds": ["generate", "paint"], "loaded": True, "colour": "red"}
    engine = {"features": ["logprobs", "telepathy"], "models": {"m": model}, "max_batch_size": 8, "speed": 3}
    announced = {
        "id": "w", "host": "h", "pid": 1, "started": 0.0, "queues": ["onnx"],
        "in_force": {"a": 1}, "limits": {"new": 1},
        "engines": [{"name": "onnx", **engine}, {"name": "abacus", **engine}],
    }  # fmt: skip

    worker = WorkerInfo.model_validate(announced)

    assert [info.name for info in worker.engines] == [EngineName.ONNX]
    assert worker.serves(EngineName.ONNX, "m", Kind.GENERATE, {Feature.LOGPROBS})
    assert not worker.serves(EngineName.ONNX, "m", Kind.CHAT)


def test_what_is_new_is_kept_beside_what_readers_of_0_1_0_know() -> None:
    """They refuse an announcement with any other field in it."""
    known = {"id", "host", "pid", "started", "queues", "engines", "in_flight", "gpus", "gpu_problems", "age_ms"}

    assert WorkerInfo.model_fields.keys() - AFTER_0_1_0 == known
    assert EngineInfo.model_fields.keys() == {"name", "features", "models", "max_batch_size", "failed"}
    assert ServedModel.model_fields.keys() == {"kinds", "loaded", "parity", "notes"}
