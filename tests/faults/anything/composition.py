"""What happens in one composition, as values: who asks for what, who serves, and what breaks when.

A composition is all that a run depends on. It is drawn from a seed (:mod:`tests.faults.anything.draw`), can be written
to a file and read back, and is made smaller by leaving parts of it out. Times are seconds from when the first workers
are there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from shared.contract import InferenceRequest

OURS = ("client", "asyncio", "map", "async map", "batch", "forked", "again", "conflict")
CELERY = ("celery", "celery again", "chain", "group", "chord", "chord body")
"""The ways to ask: with our clients, and with nothing but Celery."""

TOKENS = 100_000
"""As many as any answer needs: answers are whole."""

ALPHABETS = {
    "latin": "abcdefghij klmnop",
    "wide": "日本語テキスト漢字",
    "signs": "😀🙈é\u0301ß\u200d☃",
    "control": "\t\n\r\x00\x1b\x7f\\\"'{}%s",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request. ``word`` is what it tells the fake engine to do, ``odd`` what is wrong with it."""

    id: str
    model: str = "echo"
    kind: str = "generate"
    word: str = ""
    size: int = 8
    alphabet: str = "latin"
    texts: int = 1
    priority: str = "normal"
    tenant: str = "default"
    odd: str = ""

    @property
    def content(self) -> str:
        """The text that it is about, which no other has."""
        letters = ALPHABETS[self.alphabet]
        filler = (letters * (self.size // len(letters) + 1))[: self.size]
        return " ".join(part for part in (self.word, self.id, filler) if part)

    def request(self, *, inputs: bool = True) -> dict[str, Any]:
        """It as a sender writes it; without inputs it works on what the step before it has answered."""
        fields: dict[str, Any] = {
            "id": self.id, "model": self.model, "kind": self.kind, "priority": self.priority,
            "params": {"max_tokens": TOKENS},
        }  # fmt: skip
        if self.tenant != "default":
            fields["tenant"] = self.tenant
        if inputs:
            fields["inputs"] = self._inputs()
        return {**fields, **ODD[self.odd], "id": self.own_id} if self.odd else fields

    @property
    def own_id(self) -> str:
        """The id that its sender gives it."""
        return self.id + ODD_IDS.get(self.odd, "")

    def _inputs(self) -> dict[str, Any]:
        if self.kind == "generate":
            return {"prompt": self.content}
        if self.kind == "chat":
            return {"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": self.content}]}
        texts = {"texts": [f"{number} {self.content}" for number in range(self.texts)]}
        return {**texts, "query": self.id} if self.kind == "rerank" else texts

    def parsed(self) -> InferenceRequest:
        """It as a worker reads it."""
        return InferenceRequest.parse(self.request())


ODD: Mapping[str, dict[str, Any]] = {
    "unknown model": {"model": "nobody"},
    "unserved kind": {"model": "only", "kind": "embed", "inputs": {"texts": ["a"]}},
    "no such kind": {"kind": "guess"},
    "no inputs": {"inputs": {}},
    "empty prompt": {"inputs": {"prompt": ""}},
    "too large": {"inputs": {"prompt": "x" * 450_000}},
    "lone surrogate": {"inputs": {"prompt": "half a pair: \ud83d"}},
    "unknown field": {"colour": "blue"},
    "not a number": {"params": {"temperature": float("nan")}},
    "bad tenant": {"tenant": "a/b"},
    "long id": {},
    "id of two lines": {},
}
ODD_IDS: Mapping[str, str] = {"long id": "x" * 300, "id of two lines": "\nsecond"}
"""What is wrong with odd requests; all of it is the sender's error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Somebody who asks, at a time, in one of the ways of :mod:`tests.faults.anything.callers`, and waits.

    ``pace`` is the pause between its submits (0: all at once). The first ``cancels`` of its requests are cancelled
    ``cancel_after`` seconds after the last submit. ``timeout``, ``countdown`` and ``expires`` hold for each request.
    The clock of one that is a process of its own is off by ``skew`` seconds.
    """

    how: str
    at: float = 0.0
    asks: tuple[Ask, ...] = ()
    queue: str = "fake"
    proxied: bool = False
    timeout: float | None = None
    countdown: float | None = None
    expires: float | None = None
    eta: bool = False
    cancels: int = 0
    cancel_after: float = 0.0
    pace: float = 0.0
    window: int = 512
    on_outage: str = "raise"
    skew: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A worker process, started at a time (0: before anything else)."""

    queues: str = "fake"
    at: float = 0.0
    batch: int = 8
    latency_ms: float = 3.0
    per_item_ms: float = 1.0
    load_ms: float = 0.0
    first_ms: float = 0.0
    proxied: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Something that breaks at a time, and is whole again ``seconds`` later. ``amount`` says how far a clock steps."""

    kind: str
    at: float
    seconds: float = 0.0
    worker: int = 0
    amount: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Composition:
    """All of it. ``respawn``: workers that end are replaced."""

    seed: int
    style: str
    workers: tuple[Worker, ...]
    callers: tuple[Caller, ...]
    faults: tuple[Fault, ...] = ()
    respawn: bool = True
    lease: float = 1.5
    max_deliveries: int = 4
    rescue_after: float = 60.0
    queue_capacity: int = 100_000
    tenants: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def to_json(self) -> str:
        """It as text."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Composition:
        """It from text."""
        data = json.loads(text)
        callers = [{**one, "asks": tuple(Ask(**ask) for ask in one["asks"])} for one in data["callers"]]
        return cls(**{
            **data,
            "workers": tuple(Worker(**one) for one in data["workers"]),
            "callers": tuple(Caller(**one) for one in callers),
            "faults": tuple(Fault(**one) for one in data["faults"]),
        })  # fmt: skip

    def asks(self) -> list[Ask]:
        """Every request."""
        return [ask for caller in self.callers for ask in caller.asks]

    def has(self, *kinds: str) -> bool:
        """Whether a fault of one of these kinds is in it."""
        return any(fault.kind in kinds for fault in self.faults)

    def __str__(self) -> str:
        callers = ", ".join(f"{caller.how}x{len(caller.asks)}" for caller in self.callers)
        faults = ", ".join(f"{fault.kind} at {fault.at:g}" for fault in self.faults) or "none"
        workers = ", ".join(f"{worker.queues}/{worker.batch}" for worker in self.workers)
        return f"seed {self.seed} ({self.style}); workers {workers}; callers {callers}; faults {faults}"
