"""Classifying and reranking: a classification head's scores into answers, the same for every engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shared.contract import InferenceRequest, Kind, Usage
from shared.errors import EngineError, EngineLoadError
from shared.settings import ModelSpec
from workers.engines.base import Emit, EngineOutput, OnTokens
from workers.engines.common.lengths import Floats, Padded, run_together
from workers.engines.common.text import TextCodec

Score = Callable[[Padded], Floats]
"""Texts, or pairs of them, to one score a label, of shape (texts, labels): as the head gives them."""

RERANKER_LABELS = (1, 2)
"""How many labels a cross-encoder may have: its score, or whether the text does not or does fit the query."""


@dataclass(frozen=True, slots=True)
class Labels:
    """A classifier's labels by index; ``several``: each is right or wrong by itself (multi-label)."""

    names: tuple[str, ...]
    several: bool

    @classmethod
    def of(cls, config: Any, spec: ModelSpec) -> Labels:
        """The labels that a transformers configuration names.

        Raises :class:`EngineLoadError` where the model is to rerank and has more labels than a cross-encoder.
        """
        named: Mapping[int, str] = config.id2label
        labels = cls(
            tuple(str(named[index]) for index in range(len(named))),
            getattr(config, "problem_type", None) == "multi_label_classification",
        )
        if Kind.RERANK in spec.kinds and len(labels.names) not in RERANKER_LABELS:
            raise EngineLoadError(
                f"model {spec.name!r} is declared for rerank and has {len(labels.names)} labels; "
                "a cross-encoder has one, or two of which the last says that the text fits"
            )
        return labels

    def probabilities(self, scores: Floats) -> Floats:
        """Probabilities of shape (texts, labels): a softmax, or a sigmoid for labels that do not exclude each other."""
        wide = scores.astype(np.float64)
        if self.several:
            return (0.5 * (1.0 + np.tanh(0.5 * wide))).astype(np.float32)  # a sigmoid that cannot overflow
        weights = np.exp(wide - wide.max(axis=1, keepdims=True))
        shares: Floats = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
        return shares

    def classified(self, scores: Floats) -> dict[str, Any]:
        """The outputs of a classify request."""
        found = self.probabilities(scores)
        best = [self.names[index] for index in found.argmax(axis=1)]
        return {"labels": best, "scores": found.tolist(), "label_names": list(self.names)}

    def reranked(self, scores: Floats) -> dict[str, Any]:
        """The outputs of a rerank request: the last label's score as the head gives it, the higher the better."""
        found = scores[:, -1]
        return {"scores": found.tolist(), "order": np.argsort(-found, kind="stable").tolist()}


def score(
    requests: Sequence[InferenceRequest], codec: TextCodec, labels: Labels, pad: int, forward: Score, emit: Emit,
    tell: OnTokens | None = None,
) -> None:  # fmt: skip
    """Answer classify requests, or rerank requests, together."""
    started = time.perf_counter()
    rerank = requests[0].kind is Kind.RERANK
    encode, answer = (codec.encode_pairs, labels.reranked) if rerank else (codec.encode_texts, labels.classified)
    for member in run_together(requests, encode, pad, forward, emit, tell):
        if not np.isfinite(member.vectors).all():
            emit(member.index, EngineError("the model's scores are not finite"))
            continue
        taken_ms = (time.perf_counter() - started) * 1000
        outputs = answer(member.vectors)
        emit(member.index, EngineOutput(outputs, Usage(prompt_tokens=member.tokens), prefill_ms=taken_ms))
