"""What exporters say is dropped; what the worker says is not, whatever exports run at the same time."""

import logging
import warnings

from workers.engines.onnx.graphs import quieten


def say(path: str) -> None:
    """A warning through the root logger, from a module at this path."""
    root = logging.getLogger()
    root.handle(root.makeRecord(root.name, logging.WARNING, path, 1, "from %s", (path,), None))


def test_only_the_exporters_warnings_are_dropped(caplog) -> None:
    """The quantiser speaks through the root logger, whose level is the worker's own."""
    level = logging.getLogger().level
    with warnings.catch_warnings():
        quieten()
        quieten()
        logging.getLogger("torch.onnx._internal").warning("of an export")
        say("/lib/onnxruntime/quantization/quantize.py")
        say("/lib/workers/models.py")
        logging.getLogger("workers.models.manager").warning("of the worker")

    assert [record.getMessage() for record in caplog.records] == ["from /lib/workers/models.py", "of the worker"]
    assert logging.getLogger().level == level
