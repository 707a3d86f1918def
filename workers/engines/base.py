"""The engine contract: small, and without a word about queues, Redis or batching.

An :class:`Engine` loads models; a :class:`LoadedModel` answers batches. One contract suite (``tests/contract``) runs
over every engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from shared.contract import EngineName, InferenceRequest, Kind, Usage
from shared.errors import FleetError
from shared.settings import ModelSpec, Settings


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether an engine can run on this machine; where not, why and the command that mends it."""

    ok: bool
    reason: str = ""
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """What an engine says of one request. Times are in milliseconds.

    ``outputs`` is what the caller sees: ``{"text", "token_ids", "finish_reason"}`` for generate and chat (chat also
    ``message``), ``{"embeddings": [[float]], "dimensions": int}`` for embed, ``{"labels": [str], "scores": [[float]],
    "label_names": [str]}`` for classify, ``{"scores": [float], "order": [int]}`` for rerank, and ``{"text", "texts",
    "token_ids": [[int]], "finish_reasons": [str]}`` for summarize and translate.
    """

    outputs: dict[str, Any]
    usage: Usage = field(default_factory=Usage)
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    cache_hit: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)


class Emit(Protocol):
    """Takes the outcome of member ``index`` of a batch, once, as soon as it is known."""

    def __call__(self, index: int, outcome: EngineOutput | FleetError) -> None:
        """Take it."""
        ...


class LoadedModel(ABC):
    """A model that is in memory and answers batches. Used by one thread at a time."""

    spec: ModelSpec
    kinds: frozenset[Kind]
    max_context: int | None = None
    """Longest sequence (prompt and completion) in tokens; ``None`` where the model has no limit."""
    memory_bytes: int = 0

    @abstractmethod
    def infer(self, requests: Sequence[InferenceRequest], emit: Emit) -> None:
        """Run the batch and call ``emit`` once for each member, in any order, each as soon as it is finished.

        A member that cannot be served (its prompt is too long, its kind is not served) is emitted as the error and
        leaves the others alone. An exception means that every member not yet emitted failed:
        :class:`~shared.errors.EngineOutOfMemory` for memory, any other for the rest.
        """

    def warmup(self) -> None:
        """Run once after loading so that the first request does not pay for lazy initialisation."""

    def close(self) -> None:
        """Free the memory."""


class Engine(ABC):
    """Loads models for one kind of runtime."""

    name: ClassVar[EngineName]

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @classmethod
    @abstractmethod
    def availability(cls, settings: Settings) -> Availability:
        """Whether this engine's libraries are here. Must not import them when that is slow."""

    @abstractmethod
    def load(self, spec: ModelSpec) -> LoadedModel:
        """Load a model; raise :class:`~shared.errors.EngineLoadError` where that fails."""

    def compatibility(self, request: InferenceRequest) -> Hashable:
        """Requests with equal keys (and the same model) may share a batch."""
        return request.kind

    def close(self) -> None:
        """Free what the engine itself holds."""
