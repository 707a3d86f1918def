"""The engine contract: small, and without a word about queues, Redis or batching.

An :class:`Engine` loads models; a :class:`LoadedModel` answers batches and tells a listener of the tokens as it makes
them. One contract suite (``tests/contract``) runs over every engine.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from shared.contract import EngineName, Feature, InferenceRequest, Kind, Usage
from shared.errors import FleetError
from shared.settings import ModelSpec, Settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether an engine can run on this machine; where not, why and the command that mends it."""

    ok: bool
    reason: str = ""
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """What an engine says of one request. Times are in milliseconds.

    ``prefill_ms`` goes from when the engine took the request to its first token, or, where it writes none, to its
    answer; ``decode_ms`` from the first token to the answer.

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


@dataclass(slots=True)
class NewTokens:
    """What a running request has gained since it was last told of.

    Not frozen, though nobody changes it: one is made for each row of each step, and a frozen one takes three times as
    long to make.
    """

    request_id: str
    token_ids: Sequence[int]
    """Empty where the engine shows none and has made progress."""
    index: int = 0
    """Which of its texts, where a request has several that are rewritten."""


OnTokens = Callable[[Sequence[NewTokens]], None]
"""Takes what a step of the engine has made, for all requests of the step together, on any thread. Must not block.

For a request that is answered, what it is given, one after the other, is the answer's ``token_ids``, all of it before
the answer: with the tokens of a stop string, which is cut from the text only, and without the end token unless
``ignore_eos`` keeps it. A request that is not answered (it failed, it was cancelled, its batch is run again) may have
been told of: whoever runs it again is told from its first token on. After it has ended nothing is told of a request.
"""


class LoadedModel(ABC):
    """A model that is in memory and answers batches. Used by one thread at a time."""

    spec: ModelSpec
    kinds: frozenset[Kind]
    max_context: int | None = None
    """Longest sequence (prompt and completion) in tokens; ``None`` where the model has no limit."""
    dimensions: int | None = None
    """Numbers in an embedding, where that is known."""
    memory_bytes: int = 0
    precision: str = "float32"
    """Number format of the weights: how closely its answers can be held to those of the reference."""
    notes: tuple[str, ...] = ()
    """What an operator should know of how it was loaded."""

    on_death: Callable[[FleetError], None] | None = None
    """Called, on any thread, as soon as it is known that a process of the model's own has died."""

    on_tokens: OnTokens | None = None
    """Called, on any thread, with what a step has made. ``None``: nobody listens, and it costs nothing."""

    @property
    def telling(self) -> OnTokens | None:
        """:meth:`tell`, where somebody listens."""
        return None if self.on_tokens is None else self.tell

    def tell(self, made: Sequence[NewTokens]) -> None:
        """Call the listener. One that raises is dropped, with a line in the log: the batch goes on without it."""
        listener = self.on_tokens
        if listener is None:
            return
        try:
            listener(made)
        except Exception:  # whatever a listener raises is its own fault, and no request's
            self.on_tokens = None
            logger.exception("%s: what listens to its tokens failed and is told no more", self.spec.name)

    @property
    def alive(self) -> bool:
        """Whether it can still answer; ``False`` where a process of its own has died."""
        return True

    @abstractmethod
    def infer(self, requests: Sequence[InferenceRequest], emit: Emit) -> None:
        """Run the batch and call ``emit`` once for each member, in any order, each as soon as it is finished.

        A member that cannot be served (its prompt is too long, its kind is not served) is emitted as the error and
        leaves the others alone. An exception means that every member not yet emitted failed:
        :class:`~shared.errors.EngineOutOfMemory` for memory, any other for the rest.
        """

    def check(self, request: InferenceRequest) -> None:
        """Raise what :meth:`infer` would emit of a request whose texts do not all fit, where that can be told.

        Asked before the first part of a request that runs in parts: no more than what may not fit is looked at.
        """

    def abort(self, request_id: str) -> None:
        """The answer to a running request is not wanted any longer. May be called from any thread; may do nothing."""

    def warmup(self) -> None:
        """Run once after loading so that the first request does not pay for lazy initialisation."""

    def close(self) -> None:
        """Free the memory."""


Done = Callable[[EngineOutput | FleetError], None]
"""Takes the outcome of one request, once, on any thread."""


class ContinuousModel(LoadedModel):
    """A model that batches by itself: requests join and leave what runs at any time."""

    @abstractmethod
    def submit(self, request: InferenceRequest, done: Done) -> None:
        """Take a request in and return at once. Where the model has died, ``done`` is given that."""

    def infer(self, requests: Sequence[InferenceRequest], emit: Emit) -> None:
        """Submit all and wait for all."""
        left = threading.Semaphore(0)

        def done_of(index: int) -> Done:
            def done(outcome: EngineOutput | FleetError) -> None:
                emit(index, outcome)
                left.release()

            return done

        for index, request in enumerate(requests):
            self.submit(request, done_of(index))
        for _ in requests:
            left.acquire()


class Engine(ABC):
    """Loads models for one kind of runtime. ``features`` is what it can do beyond answering a kind."""

    name: ClassVar[EngineName]
    features: ClassVar[frozenset[Feature]] = frozenset()

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @classmethod
    @abstractmethod
    def availability(cls, settings: Settings) -> Availability:
        """Whether this engine's libraries are here. Must not import them when that is slow."""

    @abstractmethod
    def load(self, spec: ModelSpec) -> LoadedModel:
        """Load a model; raise :class:`~shared.errors.EngineLoadError` where that fails."""

    @property
    def slots(self) -> int | None:
        """How many requests run side by side where the engine batches by itself; ``None`` where it is given batches.

        The models of an engine with slots are :class:`ContinuousModel`.
        """
        return None

    def compatibility(self, request: InferenceRequest) -> Hashable:
        """Requests with equal keys (and the same model) may share a batch."""
        return request.kind

    def close(self) -> None:
        """Free what the engine itself holds."""
