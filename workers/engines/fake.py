"""A deterministic engine without a model: the tests' and benchmarks' stand-in on the queue path.

The answer is a function of the request alone. A prompt that begins with one of these words misbehaves on purpose:
``!bad`` is refused as the caller's error, ``!fail`` fails as the engine's, ``!crash`` raises for the whole batch,
``!quote`` too, with the prompt in its text;
``!busy`` meets a busy engine every time, ``!busy once`` the first time.

It shows no tokens. A listener is told that all members make progress, ``CHUNKS`` times on the way to their answers.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace

from shared.contract import EngineName, InferenceRequest, Kind, Usage
from shared.errors import BadRequest, EngineBusy, EngineError
from shared.settings import FakeSettings, ModelSpec, Settings
from workers.engines.base import Availability, Emit, Engine, EngineOutput, LoadedModel, NewTokens

DIMENSIONS = 8
LABELS = ("even", "odd")
CHUNKS = 4


class FakeModel(LoadedModel):
    """Answers at once, or after the configured time."""

    def __init__(self, spec: ModelSpec, settings: FakeSettings) -> None:
        self.spec = spec
        self.kinds = frozenset(spec.kinds)
        self._settings = settings
        self._met_busy: set[str] = set()

    def infer(self, requests: Sequence[InferenceRequest], emit: Emit) -> None:
        """Answer every member; see the module for the words that misbehave."""
        waited = self._wait(requests)
        for request in requests:
            text = _text(request)
            if text.startswith("!crash"):
                raise RuntimeError("the fake engine was told to crash")
            if text.startswith("!quote"):
                raise RuntimeError(f"the fake engine cannot run {text!r}")
        for index, request in enumerate(requests):
            if self._busy(request):
                emit(index, EngineBusy("the fake engine was told to be busy"))
            else:
                outcome = answer(request)
                if isinstance(outcome, EngineOutput) and waited:
                    outcome = replace(outcome, prefill_ms=waited / CHUNKS, decode_ms=waited - waited / CHUNKS)
                emit(index, outcome)

    def _wait(self, requests: Sequence[InferenceRequest]) -> float:
        """Let the configured time pass, which is returned in ms, and tell of it on the way; at least once."""
        delay = self._settings.latency_ms + self._settings.per_item_ms * sum(request.rows for request in requests)
        tell = self.telling
        made = [] if tell is None else [NewTokens(request.id, ()) for request in requests]
        started = time.perf_counter()
        for chunk in range(1, CHUNKS + 1) if delay else (CHUNKS,):
            if delay:
                time.sleep(max(0.0, started + delay * chunk / CHUNKS / 1000 - time.perf_counter()))
            if tell is not None:
                tell(made)
        return delay

    def _busy(self, request: InferenceRequest) -> bool:
        prompt = request.inputs.prompt or ""
        if not prompt.startswith("!busy") or request.id in self._met_busy:
            return False
        if prompt.startswith("!busy once"):
            self._met_busy.add(request.id)
        return True


def answer(request: InferenceRequest) -> EngineOutput | BadRequest | EngineError:
    """The fake answer to a request: its last characters first, as many as ``max_tokens`` allows."""
    inputs = request.inputs
    if inputs.texts is not None and request.kind not in (Kind.GENERATE, Kind.CHAT):
        return _of_texts(request, inputs.texts)
    text = _text(request)
    if text.startswith("!bad"):
        return BadRequest("the fake engine was told to refuse this request")
    if text.startswith("!fail"):
        return EngineError("the fake engine was told to fail")
    written = text[::-1][: request.params.max_tokens]
    outputs: dict[str, object] = {"text": written, "token_ids": [], "finish_reason": "stop"}
    if request.kind is Kind.CHAT:
        outputs["message"] = {"role": "assistant", "content": written}
    return EngineOutput(outputs, Usage(prompt_tokens=len(text), completion_tokens=len(written)))


def _text(request: InferenceRequest) -> str:
    inputs = request.inputs
    if inputs.prompt is not None:
        return inputs.prompt
    return inputs.messages[-1].content if inputs.messages else ""


def _of_texts(request: InferenceRequest, texts: Sequence[str]) -> EngineOutput:
    """Vectors and scores that are digests of the texts; texts rewritten like a prompt, from their last character on."""
    read = request.inputs.characters() + (len(texts) - 1) * len(request.inputs.query or "")  # a query beside each text
    outputs: dict[str, object]
    if request.kind in (Kind.SUMMARIZE, Kind.TRANSLATE):
        written = [text[::-1][: request.params.max_tokens] for text in texts]
        outputs = {
            "text": written[0],
            "texts": written,
            "token_ids": [[] for _ in texts],
            "finish_reasons": ["stop" for _ in texts],
        }
        return EngineOutput(outputs, Usage(prompt_tokens=read, completion_tokens=sum(map(len, written))))
    if request.kind is Kind.CLASSIFY:
        shares = [_vector(text)[0] for text in texts]
        outputs = {
            "labels": [LABELS[share < 0.5] for share in shares],
            "scores": [[share, 1 - share] for share in shares],
            "label_names": list(LABELS),
        }
    elif request.kind is Kind.RERANK:
        scores = [_vector(f"{request.inputs.query}\n{text}")[0] for text in texts]
        order = sorted(range(len(texts)), key=lambda index: -scores[index])
        outputs = {"scores": scores, "order": order}
    else:
        outputs = {"embeddings": [_vector(text) for text in texts], "dimensions": DIMENSIONS}
    return EngineOutput(outputs, Usage(prompt_tokens=read))


def _vector(text: str) -> list[float]:
    return [byte / 255 for byte in hashlib.sha256(text.encode()).digest()[:DIMENSIONS]]


class FakeEngine(Engine):
    """Loads fake models at once, or after the configured time."""

    name = EngineName.FAKE

    @classmethod
    def availability(cls, settings: Settings) -> Availability:
        """It needs nothing, so it is always there."""
        return Availability(True)

    def load(self, spec: ModelSpec) -> FakeModel:
        """A fake model with the kinds that its declaration names."""
        time.sleep(self.settings.optimization.fake.load_ms / 1000)
        return FakeModel(spec, self.settings.optimization.fake)
