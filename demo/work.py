"""What the demo submits, and what it makes of the answers."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demo.questions import Question, draw
from shared.contract import InferenceResult
from shared.errors import FleetError

SENTENCES = (
    "The cat sleeps on the warm window sill.",
    "A kitten is napping in the sun.",
    "The stock market fell sharply on Monday.",
    "Shares lost a tenth of their value after the announcement.",
    "To bake bread you need flour, water, salt and yeast.",
    "Knead the dough for ten minutes, then let it rise.",
    "The train to the coast leaves at half past seven.",
    "Our flight was delayed because of heavy fog.",
    "The striker scored twice in the second half.",
    "Our team won the final after extra time.",
    "Plants turn sunlight into sugar.",
    "Leaves are green because of chlorophyll.",
)
QUERIES = (
    ("Where is my cat dozing?", 0),
    ("Why did investors lose money?", 3),
    ("How do I make a loaf at home?", 4),
    ("When does the next train go?", 6),
    ("Who won the football match?", 9),
    ("How do plants make their food?", 10),
)
GENERATOR = "demo"
EMBEDDER = "minilm"


@dataclass(frozen=True, slots=True)
class Job:
    """One request of the demo, and what its answer should be where that is known."""

    request: dict[str, Any]
    task: str
    expect: str | None = None


def make_inputs(path: Path, questions: int = 360, seed: int = 3) -> None:
    """Write the demo's input file: generate, chat and embed requests, mixed, for both engines."""
    rng = random.Random(seed)
    lines: list[dict[str, Any]] = []
    for number in range(questions):
        question = draw(rng, held_out=True)
        lines.append(_line(question, chat=number % 3 == 2, engine=("onnx", "pytorch")[number % 2]))
    for number, text in enumerate([*SENTENCES, *(query for query, _ in QUERIES)]):
        request = {"model": EMBEDDER, "kind": "embed", "inputs": {"texts": [text]}}
        lines.append({"request": {**request, "engine_preference": [("onnx", "pytorch")[number % 2]]}, "task": "embed"})
    rng.shuffle(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _line(question: Question, *, chat: bool, engine: str) -> dict[str, Any]:
    inputs: dict[str, Any] = (
        {"messages": [{"role": "user", "content": question.chat}]} if chat else {"prompt": question.prompt}
    )
    request = {
        "model": GENERATOR, "kind": "chat" if chat else "generate", "inputs": inputs, "params": {"max_tokens": 12},
        "engine_preference": [engine, "onnx" if engine == "pytorch" else "pytorch"],
    }  # fmt: skip
    return {"request": request, "task": question.task, "expect": question.answer}


def read_inputs(path: Path) -> list[Job]:
    """The jobs of an input file."""
    lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    return [Job(line["request"], line["task"], line.get("expect")) for line in lines]


@dataclass(slots=True)
class EngineRow:
    """What one engine did."""

    requests: int = 0
    batches: list[int] = field(default_factory=list)
    queued: list[float] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)
    tokens: int = 0


@dataclass(slots=True)
class Report:
    """The outcome of the run."""

    engines: dict[str, EngineRow]
    errors: list[tuple[Job, FleetError]]
    right: dict[str, tuple[int, int]]
    samples: list[tuple[Job, InferenceResult]]
    vectors: dict[str, list[float]]


def report(jobs: Sequence[Job], outcomes: Iterable[InferenceResult | FleetError]) -> Report:
    """Sum the answers up."""
    engines: dict[str, EngineRow] = defaultdict(EngineRow)
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    errors: list[tuple[Job, FleetError]] = []
    samples: dict[str, tuple[Job, InferenceResult]] = {}
    vectors: dict[str, list[float]] = {}
    for job, outcome in zip(jobs, outcomes, strict=True):
        if isinstance(outcome, FleetError):
            errors.append((job, outcome))
            continue
        row = engines[outcome.engine_used]
        row.requests += 1
        row.batches.append(outcome.batch_size)
        row.queued.append(outcome.metadata["timing"]["queued_ms"])
        row.latency.append(outcome.latency_ms)
        row.tokens += outcome.metadata["usage"]["total_tokens"]
        if job.expect is not None:
            counts[job.task][0] += outcome.text == job.expect
            counts[job.task][1] += 1
        if "text" in outcome.outputs:
            samples.setdefault(f"{job.task}-{job.request['kind']}", (job, outcome))
        for text, vector in zip(
            job.request["inputs"].get("texts", ()), outcome.outputs.get("embeddings", ()), strict=True
        ):
            vectors[text] = vector  # noqa: PERF403
    right = {task: (good, total) for task, (good, total) in sorted(counts.items())}
    return Report(dict(engines), errors, right, list(samples.values())[:3], vectors)


def nearest(vectors: dict[str, list[float]]) -> list[tuple[str, str, float, bool]]:
    """For each query its nearest sentence, the cosine similarity, and whether that is the sensible one."""
    found = []
    for query, sensible in QUERIES:
        scores = {text: sum(a * b for a, b in zip(vectors[query], vectors[text], strict=True)) for text in SENTENCES}
        best = max(scores, key=scores.__getitem__)
        pair = sensible // 2 * 2  # sentences come in pairs on one subject; either of them is sensible
        found.append((query, best, scores[best], best in SENTENCES[pair : pair + 2]))
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered) + 0.5) - 1))]
