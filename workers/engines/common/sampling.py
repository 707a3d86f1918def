"""Choosing the next token of each row.

Greedy rows take the most likely token. Sampled rows use temperature, top-k and top-p (nucleus sampling, Holtzman et al.
2020, arXiv:1904.09751), each with a generator of its own, so that a seeded request does not depend on who shares its
batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shared.contract import SamplingParams

Tokens = NDArray[np.int64]
Scores = NDArray[np.float32]


class Logits(ABC):
    """The scores of the next token, of shape (rows, vocabulary), wherever they are."""

    @abstractmethod
    def best(self) -> tuple[Tokens, Scores]:
        """The most likely token of each row and its score."""

    @abstractmethod
    def row(self, index: int) -> Scores:
        """The scores of one row, of shape (vocabulary,)."""


class ArrayLogits(Logits):
    """Scores in a NumPy array."""

    def __init__(self, scores: Scores) -> None:
        self._scores = scores

    def best(self) -> tuple[Tokens, Scores]:
        """The most likely token of each row and its score."""
        tokens = self._scores.argmax(axis=-1)
        return tokens, self._scores[np.arange(len(tokens)), tokens]

    def row(self, index: int) -> Scores:
        """The scores of one row."""
        row: Scores = self._scores[index]
        return row


class Sampler:
    """Chooses tokens for one request."""

    def __init__(self, params: SamplingParams) -> None:
        self.greedy = params.temperature == 0.0
        self._params = params
        self._random = None if self.greedy else np.random.default_rng(params.seed)

    def draw(self, scores: Scores) -> int:
        """A token from the distribution that ``scores`` and the parameters give."""
        params = self._params
        if self._random is None:
            return int(scores.argmax())
        scaled = scores.astype(np.float64) / params.temperature
        if params.top_k and params.top_k < len(scaled):
            smallest = np.partition(scaled, -params.top_k)[-params.top_k]
            scaled = np.where(scaled < smallest, -np.inf, scaled)
        weights = np.exp(scaled - scaled.max())
        weights /= weights.sum()
        if params.top_p < 1.0:
            order = np.argsort(-weights, kind="stable")
            before = np.cumsum(weights[order]) - weights[order]
            weights[order[before >= params.top_p]] = 0.0
            weights /= weights.sum()
        drawn = int(np.searchsorted(np.cumsum(weights), self._random.random(), side="right"))
        return min(drawn, len(weights) - 1)


def choose(logits: Logits, samplers: Sequence[Sampler]) -> tuple[list[int], list[bool]]:
    """The next token of each row, and whether the row's scores were sound (a NaN or infinity is not)."""
    tokens, values = logits.best()
    sound = np.isfinite(values).tolist()
    chosen = tokens.tolist()
    for index, sampler in enumerate(samplers):
        if not sampler.greedy and sound[index]:
            chosen[index] = sampler.draw(logits.row(index))
    return chosen, sound


def log_probabilities(scores: Scores, token: int, most: int) -> dict[str, object]:
    """The log probability of ``token`` by these scores, and of the ``most`` likeliest tokens, best first."""
    wide = scores.astype(np.float64)
    logs = wide - wide.max()
    logs -= np.log(np.exp(logs).sum())
    best = np.argsort(-logs, kind="stable")[:most].tolist()
    return {
        "token_id": int(token),
        "logprob": float(logs[token]),
        "top": [{"token_id": other, "logprob": float(logs[other])} for other in best],
    }
