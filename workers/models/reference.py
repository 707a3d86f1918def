"""``python -m workers.models.reference``: what PyTorch in float32 on a CPU answers to the questions on standard input.

Reads ``{"spec": {...}, "asked": [request, ...]}`` and prints one line, a list of answers, for the parity gate.
"""

from __future__ import annotations

import os
import sys

import orjson


def main() -> None:
    """Answer and end."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: the GPU belongs to the engine that is checked
    from shared.contract import InferenceRequest
    from shared.settings import ModelSpec, Settings
    from workers.engines.pytorch.engine import PyTorchEngine
    from workers.models.parity import ask

    data = orjson.loads(sys.stdin.buffer.read())
    settings = Settings.model_validate({"optimization": {"pytorch": {"dtype": "float32", "device": "cpu"}}})
    model = PyTorchEngine(settings).load(ModelSpec.model_validate(data["spec"]))
    answers = ask(model, [InferenceRequest.parse(request) for request in data["asked"]])
    sys.stdout.buffer.write(orjson.dumps(answers, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n")


if __name__ == "__main__":
    main()
