"""A model's conversion to ONNX, made once per model and content and kept on disk.

It is made by a process of its own, ``python -m workers.engines.onnx.conversion``: the exporter changes PyTorch for the
whole process while it works, keeps the interpreter's lock most of that time, and takes memory that it does not return.
The process reads one line, ``{"spec": {...}, "onnx": {...}, "folder": "..."}``, leaves the converted model in the
folder or says in it why there is none, and ends when its standard input does: with the worker.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

import orjson

from shared.errors import EngineLoadError, FleetError
from shared.python_path import python_path
from shared.settings import ModelSpec, OnnxSettings, Settings
from workers.engines.common.processes import error_from_json, error_to_json
from workers.engines.common.roles import Role
from workers.engines.onnx.files import META, Conversion, folder_of

logger = logging.getLogger(__name__)

ERROR, LOG = "error.json", "log.txt"

_ANSWERS = {
    Role.DECODER: "next tokens",
    Role.SEQ2SEQ: "next tokens",
    Role.ENCODER: "nearest neighbours",
    Role.CLASSIFIER: "labels (or ranks)",
}


def converted(spec: ModelSpec, settings: Settings) -> tuple[Path, Conversion]:
    """The folder of the converted model, converted now if it was not before.

    Raises :class:`EngineLoadError` where the conversion fails or deviates from the original, and
    :class:`MissingDependency` where what it needs is not installed.
    """
    folder = folder_of(spec, settings)
    if (folder / META).is_file():
        return folder, Conversion.read(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
    try:
        convert_by_process(spec, settings.optimization.onnx, scratch)
        conversion = Conversion.read(scratch)
        try:
            scratch.rename(folder)
        except OSError:
            if not (folder / META).is_file():  # otherwise another worker was faster, with the same result
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if (cost := conversion.cost) is not None:
        logger.info(
            "converted %s to ONNX%s: differences of outputs: largest %.2g, mean %.2g; %.1f %% of %s agree",
            spec.name, ", quantised" if conversion.quantised else "", cost.largest, cost.mean, 100 * cost.agreement,
            _ANSWERS[conversion.role],
        )  # fmt: skip
    return folder, conversion


def convert_by_process(spec: ModelSpec, settings: OnnxSettings, folder: Path) -> None:
    """Let a process convert into a folder; raise its error."""
    asked = {"spec": spec.model_dump(mode="json"), "onnx": settings.model_dump(mode="json"), "folder": str(folder)}
    environ = {**os.environ, "PYTHONPATH": python_path(), "CUDA_VISIBLE_DEVICES": ""}  # it is done on the CPU
    log = folder / LOG
    with (
        log.open("wb") as said,
        # A session of its own: a Ctrl-C at the worker's terminal is the worker's to handle.
        subprocess.Popen(
            [sys.executable, "-m", __name__], env=environ, bufsize=0, stdin=subprocess.PIPE, stdout=said, stderr=said,
            start_new_session=True,
        ) as process,
    ):  # fmt: skip
        try:
            if process.stdin is not None:
                with suppress(BrokenPipeError):  # it has ended already
                    process.stdin.write(orjson.dumps(asked) + b"\n")
            process.wait()
        finally:
            process.kill()
    if (folder / ERROR).is_file():
        raise error_from_json(orjson.loads((folder / ERROR).read_bytes()))
    if process.returncode != 0:
        lines = log.read_text(errors="replace").strip().splitlines()
        raise EngineLoadError(
            f"cannot convert {spec.name!r} to ONNX: the process that does it ended with {process.returncode}"
            + (f": {lines[-1]}" if lines else "")
        )
    log.unlink()


def main() -> None:
    """Convert what standard input asks for."""
    asked = orjson.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_the_worker, daemon=True).start()
    from workers.engines.onnx.export import convert  # heavy

    folder = Path(asked["folder"])
    try:
        spec, settings = ModelSpec.model_validate(asked["spec"]), OnnxSettings.model_validate(asked["onnx"])
        convert(spec, settings, folder).write(folder)
    except FleetError as error:
        (folder / ERROR).write_bytes(orjson.dumps(error_to_json(error)))


def _end_with_the_worker() -> None:
    while os.read(0, 1):  # not by sys.stdin: its lock would be held when this process ends by itself
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
