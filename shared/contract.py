"""The message contract: what a request and its result look like, the same on both sides of the queue.

A request is validated once where it is made and once more where it is run, by the same model. The version of the
contract travels with every message of our own client; a message without it is taken to be of the current version.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    model_validator,
)

from shared.errors import BadRequest
from shared.features import NAMES, features_of
from shared.features import Feature as Feature
from shared.json_values import LONE_SURROGATE, flaw

CONTRACT_VERSION = 1
TASK_NAME = "muai.infer"

DEFAULT_TENANT: Final = "default"
"""The tenant of requests that name none."""

LATEST: Final = 253402300800.0
"""The end of the year 9999, in seconds since the epoch: no time in a message is later."""

SCHEMA_DEPTH: Final = 32
_SHOWN_PROBLEMS = 8
_SHOWN_NAME = 64
_TENANT = re.compile(r"[A-Za-z0-9._-]{1,64}")


class EngineName(StrEnum):
    """The engines of the fleet. Each has a queue of the same name."""

    VLLM = "vllm"
    DEEPSPEED = "deepspeed"
    ONNX = "onnx"
    PYTORCH = "pytorch"
    FAKE = "fake"


class Kind(StrEnum):
    """What is asked of a model."""

    GENERATE = "generate"
    CHAT = "chat"
    EMBED = "embed"
    CLASSIFY = "classify"
    RERANK = "rerank"
    SUMMARIZE = "summarize"
    TRANSLATE = "translate"


class Priority(StrEnum):
    """Named levels over the broker's priority steps; ``wire`` is the number on the message (0 is served first)."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"

    @property
    def wire(self) -> int:
        """The broker's number for this level."""
        return _WIRE_PRIORITY[self]


_WIRE_PRIORITY = {Priority.HIGH: 0, Priority.NORMAL: 3, Priority.LOW: 6}


class Value(BaseModel):
    """Base of every message value: immutable, and unknown fields are an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def given(self) -> dict[str, Any]:
        """What a message says of the value: the fields that its maker gave, as a writer of JSON takes them.

        A field that needs a feature, and is ``None``, is left out. A worker that does not know it would refuse the
        request, though nothing is asked for.
        """
        given = self.__pydantic_fields_set__
        return {
            name: _plain(value)
            for name, value in vars(self).items()
            if name in given and not (value is None and name in NAMES)
        }


def _plain(value: Any) -> Any:
    if type(value) is str:
        return value
    if type(value) is tuple:
        return [_plain(inner) for inner in value]
    return value.given() if isinstance(value, Value) else value


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("holds characters that cannot be printed")
    return text


def _tenant(text: str) -> str:
    if _TENANT.fullmatch(text) is None:
        raise ValueError("is 1 to 64 of the characters A-Z a-z 0-9 . _ -")
    return text


def nested_deeper(value: dict[str, Any] | list[Any], levels: int) -> bool:
    """Whether objects and lists are nested in each other more than ``levels`` deep."""
    level: list[Any] = [value]
    for _ in range(levels):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) is dict or type(inner) is list
        ]
        if not level:
            return False
    return True


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    if found := flaw(schema, SCHEMA_DEPTH):  # the engines' compilers recurse
        raise ValueError(found)
    return schema


def _listed(value: object) -> object:
    if isinstance(value, set | frozenset):
        raise ValueError("is a set, which has no order; give a list")
    return value


def _as_tuple(value: object) -> object:
    return (value,) if isinstance(value, str) else _listed(value)


Text = Annotated[str, Strict(), Field(min_length=0)]
"""Text, and not bytes that may be some; with any constraint on its length it is also known to be Unicode."""


_PRINTABLE = AfterValidator(_printable)
"""For text that may stand in a key or a line of a log."""

Tenant = Annotated[Text, AfterValidator(_tenant)]
"""Who a request belongs to: part of key names."""


class ChatMessage(Value):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Text


class SamplingParams(Value):
    """How tokens are chosen. ``temperature=0`` is greedy decoding.

    ``logprobs`` asks for the log probability of each token of the answer, and of that many of the likeliest in its
    place; ``json_schema`` holds the answer to a JSON schema. An engine that cannot do so is not asked.
    """

    max_tokens: Annotated[int, Field(ge=1, le=131072)] = 64
    temperature: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=2**63)] = 0
    stop: Annotated[tuple[Annotated[Text, Field(min_length=1, max_length=256)], ...], BeforeValidator(_listed)] = Field(
        default=(), max_length=16
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    ignore_eos: bool = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    json_schema: Annotated[dict[str, Any], AfterValidator(_json)] | None = None


USUAL_PARAMS: Final = SamplingParams()
"""Those of a request that gives none."""


class Inputs(Value):
    """What a request works on. Which field is needed depends on the request's kind."""

    prompt: Text | None = None
    messages: Annotated[tuple[ChatMessage, ...], BeforeValidator(_listed)] | None = None
    texts: Annotated[tuple[Text, ...], BeforeValidator(_as_tuple)] | None = None
    query: Text | None = None

    def characters(self) -> int:
        """How many characters the inputs hold: what a size can be estimated from without a tokenizer."""
        total = len(self.prompt or "") + len(self.query or "")
        if self.messages:
            total += sum(len(message.content) for message in self.messages)
        if self.texts:
            total += sum(map(len, self.texts))
        return total


_NEEDED_INPUT: dict[Kind, str] = {
    Kind.GENERATE: "prompt",
    Kind.CHAT: "messages",
    Kind.EMBED: "texts",
    Kind.CLASSIFY: "texts",
    Kind.RERANK: "texts",
    Kind.SUMMARIZE: "texts",
    Kind.TRANSLATE: "texts",
}


class InferenceRequest(Value):
    """One request to one model.

    ``id`` is also the Celery task id and the idempotency key. ``deadline`` is in seconds since the epoch; after it the
    request is no longer worth answering. ``timeout`` says the same in seconds from when it was sent, whatever the
    sender's clock shows; our client makes a deadline of it. ``engine_preference`` overrides the fleet's order for this
    request.
    """

    id: Annotated[Text, Field(min_length=1, max_length=128), _PRINTABLE] = Field(
        default_factory=lambda: str(uuid.uuid4())
    )
    model: Annotated[Text, Field(min_length=1, max_length=256), _PRINTABLE]
    kind: Kind = Kind.GENERATE
    inputs: Inputs
    params: SamplingParams = USUAL_PARAMS
    engine_preference: Annotated[tuple[EngineName, ...], BeforeValidator(_as_tuple)] | None = None
    conversation_id: Annotated[Text, Field(max_length=256), _PRINTABLE] | None = None
    priority: Priority = Priority.NORMAL
    deadline: Annotated[float, Field(ge=0.0, le=LATEST)] | None = None
    timeout: Annotated[float, Field(gt=0.0, le=LATEST)] | None = None
    tenant: Tenant = DEFAULT_TENANT
    stream: bool = False

    @model_validator(mode="after")
    def _inputs_fit_kind(self) -> Self:
        needed = _NEEDED_INPUT[self.kind]
        value = getattr(self.inputs, needed)
        if value is None:
            raise ValueError(f"a {self.kind} request needs inputs.{needed}")
        if len(value) == 0:
            raise ValueError(f"inputs.{needed} is empty")
        if self.kind is Kind.RERANK and not self.inputs.query:
            raise ValueError("a rerank request needs inputs.query")
        return self

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> InferenceRequest:
        """Validate ``data``; raise :class:`BadRequest` with one line that names each wrong field, never its value."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise BadRequest(explain(error)) from None

    @property
    def generates(self) -> bool:
        """Whether the answer is written token by token."""
        return self.kind not in (Kind.EMBED, Kind.CLASSIFY, Kind.RERANK)

    @property
    def rows(self) -> int:
        """How many sequences a model reads for it: each of its texts, or one."""
        return len(self.inputs.texts or ()) if _NEEDED_INPUT[self.kind] == "texts" else 1

    @property
    def features(self) -> frozenset[Feature]:
        """What it needs of an engine beyond its kind."""
        return features_of(self)

    def expired(self, now: float | None = None) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and (time.time() if now is None else now) >= self.deadline


class Hop(Value):
    """One engine that was tried and failed: it travels in the message headers.

    ``outage`` says that the engine was out of service, so that it may be tried again when it is back.
    """

    engine: EngineName
    error: str
    time: float
    outage: bool = False


class Usage(Value):
    """Tokens read and written."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


class InferenceResult(Value):
    """The answer to a request. A failure is never a result: it is an exception.

    ``latency_ms`` runs from the submission (from the claim, where the sender gave no time) to the outcome.
    ``metadata`` holds ``model``, ``worker``, ``timing`` (ms: queued, batched, prefill, decode), ``usage`` (tokens) and
    ``hops`` (the engines that failed before this one).
    """

    outputs: dict[str, Any]
    engine_used: EngineName
    latency_ms: float
    batch_size: int
    cache_hit: bool = False
    metadata: dict[str, Any] = Field(default_factory=dict)

    @property
    def text(self) -> str:
        """The generated text of a generate or chat request."""
        return str(self.outputs["text"])


def explain(error: ValidationError, root: str = "") -> str:
    """A validation error as one line: ``field: what is wrong``, joined by ``; ``. Values are left out on purpose."""
    parts = []
    found = error.errors(include_url=False, include_input=False, include_context=False)
    for item in found[:_SHOWN_PROBLEMS]:
        where = ".".join(str(part)[:_SHOWN_NAME] for part in ((root,) if root else ()) + item["loc"])
        message = LONE_SURROGATE if item["type"] == "string_unicode" else item["msg"].removeprefix("Value error, ")
        parts.append(f"{where}: {message}" if where else message)
    if len(found) > _SHOWN_PROBLEMS:
        parts.append(f"and {len(found) - _SHOWN_PROBLEMS} more")
    return "; ".join(parts)
