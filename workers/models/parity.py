"""The parity gate: before an engine joins a model's chain, its answers are held to those of PyTorch in float32.

A fixed set of questions goes through the engine as any request would. What PyTorch answers is kept by the digest of the
model's files, in the broker and beside the converted models; it comes from the PyTorch engine when that loads the
model, or from a process that is started for it.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import redis

from shared import keys
from shared.contract import EngineName, InferenceRequest, Kind
from shared.errors import ConfigurationError, EngineDisagrees, EngineError, FleetError
from shared.python_path import python_path
from shared.settings import ModelSpec, ParitySettings, Settings
from workers.engines.base import EngineOutput, LoadedModel
from workers.engines.common.files import content_digest, weight_bytes

logger = logging.getLogger(__name__)

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "What is 17 plus 25?",
    "a",
    "def add(a, b):\n    return a +",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "one two three one two three one two",
    "In 1969, people first walked on the moon; the year after that was",
    "short answer: yes or no?",
)
"""What is asked. Short, so that they fit every model; of several scripts and lengths, so that padding is exercised."""

ORDER = (Kind.GENERATE, Kind.EMBED, Kind.CLASSIFY, Kind.RERANK, Kind.SUMMARIZE, Kind.TRANSLATE, Kind.CHAT)
COMPARED = ("token_ids", "embeddings", "scores")
POLL_SECONDS = 0.1

Answer = Mapping[str, Any] | None
"""What is compared of an answer; ``None`` where the model refused the question."""


def questions(spec: ModelSpec, kinds: frozenset[Kind], settings: ParitySettings) -> list[InferenceRequest]:
    """The requests that are asked of a model with these kinds."""
    kind = next(kind for kind in ORDER if kind in kinds)
    asked = []
    for number in range(settings.prompts):
        text = TEXTS[number % len(TEXTS)] + ("" if number < len(TEXTS) else f" {number}")
        inputs: dict[str, Any] = {"texts": [text], "query": TEXTS[0]}
        if kind is Kind.GENERATE:
            inputs = {"prompt": text}
        elif kind is Kind.CHAT:
            inputs = {"messages": [{"role": "user", "content": text}]}
        asked.append(
            InferenceRequest.parse(
                {"model": spec.name, "kind": kind, "inputs": inputs, "params": {"max_tokens": settings.max_tokens}}
            )
        )
    return asked


def ask(model: LoadedModel, requests: Sequence[InferenceRequest]) -> list[Answer]:
    """The model's answers to the requests, asked together. Raises the engine's error where it fails on one."""
    found: dict[int, EngineOutput | FleetError] = {}

    def emit(index: int, outcome: EngineOutput | FleetError) -> None:
        found[index] = outcome

    model.infer(requests, emit)
    answers: list[Answer] = []
    for index in range(len(requests)):
        outcome = found.get(index, EngineError("the engine left a question unanswered"))
        if isinstance(outcome, EngineOutput):
            answers.append({name: outcome.outputs[name] for name in COMPARED if name in outcome.outputs})
        elif outcome.hops:
            raise outcome
        else:
            answers.append(None)
    return answers


def agreement(answers: Sequence[Answer], reference: Sequence[Answer]) -> tuple[float, float]:
    """The share of equal tokens and the largest distance, over the questions that both answered.

    Tokens are equal up to the first that differs. A distance is one minus the cosine of two embeddings, or the
    difference of two scores.
    """
    shares, distances = [], [0.0]
    for mine, wanted in zip(answers, reference, strict=True):
        if (mine is None) != (wanted is None):
            shares.append(0.0)
        if mine is None or wanted is None:
            continue
        for name in wanted:
            if name == "token_ids":
                shares.append(_equal_share(mine.get(name), wanted[name]))
            elif name == "embeddings":
                distances.append(_angular(np.array(mine[name]), np.array(wanted[name])))
            else:
                distances.append(float(np.abs(np.array(mine[name]) - np.array(wanted[name])).max()))
    return (float(np.mean(shares)) if shares else 1.0), max(distances)


def _equal_share(mine: Any, wanted: Any) -> float:
    flat_mine, flat_wanted = (list(np.concatenate(rows)) if rows and isinstance(rows[0], list) else list(rows or ())
                              for rows in (mine, wanted))  # fmt: skip
    longest = max(len(flat_mine), len(flat_wanted))
    pairs = zip(flat_mine, flat_wanted, strict=False)
    first = next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(flat_mine), len(flat_wanted)))
    return first / longest if longest else 1.0


def _angular(mine: Any, wanted: Any) -> float:
    if mine.shape != wanted.shape:
        return 2.0
    lengths = np.linalg.norm(mine, axis=-1) * np.linalg.norm(wanted, axis=-1)
    return float((1 - (mine * wanted).sum(axis=-1) / np.maximum(lengths, 1e-12)).max())


class ParityGate:
    """Checks the models of one engine."""

    def __init__(self, engine: EngineName, settings: Settings, client: redis.Redis) -> None:
        self._engine = engine
        self._settings = settings.optimization.parity
        self._folder = Path(settings.models.cache_dir).expanduser() / "reference"
        self._client = client

    def __call__(self, model: LoadedModel) -> str:
        """What came of it, in a few words; raises :class:`EngineDisagrees` where the model must not serve."""
        if not self._settings.enabled or self._engine is EngineName.FAKE:
            return ""
        asked = questions(model.spec, model.kinds, self._settings)
        name = content_digest(
            model.spec.path, asked[0].kind, str(self._settings.prompts), str(self._settings.max_tokens),
            model.spec.model_dump_json(include={"max_length", "pooling", "normalize", "prefix"}),
        )  # fmt: skip
        if self._engine is EngineName.PYTORCH and model.precision == "float32":
            self._keep(name, ask(model, asked))
            return "reference"
        try:
            reference = self._reference(name, model.spec, asked)
        except FleetError as error:
            if self._settings.required:
                raise EngineDisagrees(f"{model.spec.name!r} cannot be checked: {error}") from error
            logger.warning("%s: %s was not checked against PyTorch: %s", self._engine, model.spec.name, error)
            return f"unchecked: {error}"
        return self._compare(model, ask(model, asked), reference)

    def _compare(self, model: LoadedModel, answers: Sequence[Answer], reference: Sequence[Answer]) -> str:
        full = model.precision == "float32"
        least = self._settings.min_token_agreement if full else self._settings.min_token_agreement_reduced
        most = self._settings.max_distance if full else self._settings.max_distance_reduced
        share, distance = agreement(answers, reference)
        told = f"{share:.1%} of tokens, distance {distance:.2g}, {model.precision}"
        if share < least or distance > most:
            raise EngineDisagrees(
                f"{self._engine} does not answer as PyTorch does with {model.spec.name!r}: {told}; "
                f"wanted are {least:.1%} and {most:g} (optimization.parity)"
            )
        return f"agrees: {told}"

    # -- the reference ----------------------------------------------------------------------------------------------

    def _reference(self, name: str, spec: ModelSpec, asked: Sequence[InferenceRequest]) -> list[Answer]:
        return self._kept(name) or self._computed(name, spec, asked)

    def _kept(self, name: str) -> list[Answer] | None:
        file = self._folder / f"{name}.json"
        if file.is_file():
            return _loaded(file.read_bytes())
        try:
            stored = self._client.get(keys.parity_key(name))
        except (redis.RedisError, OSError):
            return None
        return _loaded(stored) if isinstance(stored, bytes) else None

    def _keep(self, name: str, answers: Sequence[Answer]) -> None:
        data = orjson.dumps(answers, option=orjson.OPT_SERIALIZE_NUMPY)
        try:
            self._client.set(keys.parity_key(name), data, ex=keys.PARITY_SECONDS)
        except (redis.RedisError, OSError) as error:
            logger.warning("the reference answers cannot be kept in the broker: %s", error)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            scratch = self._folder / f".{name}.{time.monotonic_ns()}"
            scratch.write_bytes(data)
            scratch.replace(self._folder / f"{name}.json")
        except OSError as error:
            logger.warning("the reference answers cannot be kept in %s: %s", self._folder, error)

    def _computed(self, name: str, spec: ModelSpec, asked: Sequence[InferenceRequest]) -> list[Answer]:
        """Ask PyTorch in a process of its own, unless a worker that has it is faster."""
        size = weight_bytes(spec.path) / 1e6
        if size > self._settings.max_reference_mb:
            raise ConfigurationError(
                f"no worker with the PyTorch engine has answered yet, and {size:.0f} MB of weights are more than "
                "optimization.parity.max_reference_mb allows"
            )
        data = orjson.dumps({"spec": spec.model_dump(mode="json"), "asked": [r.model_dump(mode="json") for r in asked]})
        deadline = time.monotonic() + self._settings.timeout_seconds
        with subprocess.Popen(
            [sys.executable, "-m", "workers.models.reference"],
            env={**os.environ, "PYTHONPATH": python_path()}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:  # fmt: skip
            try:
                while True:
                    try:
                        out, err = process.communicate(data, timeout=POLL_SECONDS)
                        break
                    except subprocess.TimeoutExpired:
                        data = b""
                        if (kept := self._kept(name)) is not None:
                            return kept
                        if time.monotonic() > deadline:
                            raise EngineError(
                                f"PyTorch has not answered within {self._settings.timeout_seconds:.0f} s"
                            ) from None
            finally:
                process.kill()
        if process.returncode != 0:
            lines = err.decode(errors="replace").strip().splitlines()
            raise EngineError(f"PyTorch cannot be asked: {lines[-1] if lines else process.returncode}")
        answers = _loaded(out.strip().splitlines()[-1])
        self._keep(name, answers)
        return answers


def _loaded(data: bytes) -> list[Answer]:
    answers: list[Answer] = orjson.loads(data)
    return answers
