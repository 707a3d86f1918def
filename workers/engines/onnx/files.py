"""Converted models on disk: what is known of one, where it lies, and when it must be made anew."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from shared.contract import Kind
from shared.settings import ModelSpec, Settings
from workers.engines.common.files import content_digest
from workers.engines.common.roles import KINDS, Role, role_of
from workers.engines.common.scoring import Labels

GRAPH = "model.onnx"
ENCODER_GRAPH = "encoder.onnx"
META = "conversion.json"
LAYOUT_VERSION = 2


@dataclass(frozen=True, slots=True)
class Cost:
    """What a conversion changes, measured on sample texts.

    ``largest`` and ``mean`` are differences of outputs as shares of the largest output. ``agreement`` is the share of
    answers that stay the same: next tokens, labels, nearest neighbours of an embedding, or the order of two texts.
    """

    largest: float
    mean: float
    least_cosine: float
    agreement: float


@dataclass(frozen=True, slots=True)
class Conversion:
    """A converted model on disk.

    ``layers``, ``kv_heads`` and ``head_size`` are the key-value cache's. ``packs`` says that several texts may share a
    row. ``start`` and ``forbidden`` are a sequence-to-sequence model's: ``Writing`` in ``engines.common.weights``.
    """

    role: Role
    layers: int
    kv_heads: int
    head_size: int
    max_context: int | None
    eos: tuple[int, ...]
    pad: int
    first_position: int = 0
    packs: bool = False
    start: tuple[int, ...] = ()
    forbidden: tuple[int, ...] = ()
    labels: Labels | None = None
    prefixes: tuple[tuple[Kind, str], ...] = ()
    quantised: bool = False
    cost: Cost | None = None

    @property
    def kinds(self) -> frozenset[Kind]:
        """What the converted graph can answer."""
        return KINDS[self.role]

    @property
    def difference(self) -> float:
        """How far it is off at most: the largest deviation; by angle (one minus the cosine) where it is quantised.

        Infinite before it is measured.
        """
        if self.cost is None:
            return float("inf")
        return 1 - self.cost.least_cosine if self.quantised else self.cost.largest

    @property
    def told(self) -> str:
        """What quantising has cost, in a few words."""
        if self.cost is None:
            return ""
        return f"8-bit weights: outputs differ by {self.cost.mean:.2g} on average, {self.cost.agreement:.0%} agree"

    @property
    def past_names(self) -> list[str]:
        """The inputs that hold the key-value cache."""
        return cache_names("past", self.layers)

    @property
    def present_names(self) -> list[str]:
        """The outputs that hold it, in the same order."""
        return cache_names("present", self.layers)

    @property
    def cross_names(self) -> list[str]:
        """What a sequence-to-sequence model's encoder graph hands to its decoder graph."""
        return cache_names("cross", self.layers)

    def write(self, folder: Path) -> None:
        """Keep it beside the graphs."""
        (folder / META).write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Conversion:
        """What was kept."""
        data: dict[str, Any] = json.loads((folder / META).read_text(encoding="utf-8"))
        labels, cost = data["labels"], data["cost"]
        return cls(
            **{
                **data,
                "role": Role(data["role"]),
                "eos": tuple(data["eos"]),
                "start": tuple(data["start"]),
                "forbidden": tuple(data["forbidden"]),
                "labels": labels and Labels(tuple(labels["names"]), labels["several"]),
                "prefixes": tuple((Kind(kind), text) for kind, text in data["prefixes"]),
                "cost": cost and Cost(**cost),
            }
        )


def cache_names(prefix: str, layers: int) -> list[str]:
    """A name for each tensor of a key-value cache."""
    return [f"{prefix}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def folder_of(spec: ModelSpec, settings: Settings) -> Path:
    """Where the conversion of a model lies, whether it is there or not."""
    own = fingerprint(spec, settings.optimization.onnx.enable_quantization)
    return Path(settings.models.cache_dir).expanduser() / "onnx" / f"{_safe(spec.name)}-{own}"


def fingerprint(spec: ModelSpec, quantise: bool) -> str:
    """Changes with the model's files, the options that shape the graph, and the libraries that write it."""
    role = role_of(spec)
    kinds = sorted(spec.kinds) if role is Role.CLASSIFIER else ()  # they say what its labels are
    parts = [str(LAYOUT_VERSION), str(quantise), str(spec.max_length), role, *kinds]
    parts += [f"{package}={_version(package)}" for package in ("transformers", "onnxruntime", "onnxruntime-gpu")]
    return content_digest(spec.path, *parts)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"


def _safe(name: str) -> str:
    return "".join(char if char.isalnum() or char in "-_." else "-" for char in name) or f"model-{os.getpid()}"
