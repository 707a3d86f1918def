"""How large requests and their answers are, estimated and learnt from what engines report. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from shared.contract import InferenceRequest, Kind

CHARACTERS_PER_TOKEN = 4.0
"""First guess; learnt per model."""

LEARNING_RATE = 0.1
TYPICAL_RATE = 0.05

NUMBER_BYTES = 8
"""Fewer bytes than the numbers of an embedding have in JSON, on the average: 21 where they are of 32 bits."""


class Typical:
    """A running geometric mean: few large values among many small ones change little. 0 before the first."""

    def __init__(self) -> None:
        self.value = 0.0

    def seen(self, value: float) -> None:
        """Another one, above 0."""
        self.value = self.value * (value / self.value) ** TYPICAL_RATE if self.value else value


class TokenEstimator:
    """Estimates requests of several models."""

    def __init__(self, length_buckets: Sequence[int]) -> None:
        self._buckets = length_buckets
        self._characters_per_token: dict[str, float] = {}
        self.rows = Typical()
        """Rows of requests that were started."""
        self.tokens = Typical()
        """Tokens of requests that were started."""

    def measured(self, request: InferenceRequest) -> tuple[list[int], int]:
        """Tokens of each row, its prompt and its longest completion together; the bucket of the longest prompt."""
        completion = request.params.max_tokens if request.generates else 0
        prompts = self._prompts(request)
        return [prompt + completion for prompt in prompts], bisect_left(self._buckets, max(prompts))

    def started(self, tokens: Sequence[int]) -> None:
        """A request with rows of these sizes was started."""
        self.rows.seen(len(tokens))
        self.tokens.seen(sum(tokens))

    def learn(self, request: InferenceRequest, prompt_tokens: int) -> None:
        """The engine says how many tokens the prompt really had."""
        if prompt_tokens:
            seen = _characters(request) / prompt_tokens
            usual = self._characters_per_token.get(request.model, seen)
            self._characters_per_token[request.model] = max(0.1, usual + LEARNING_RATE * (seen - usual))

    def _prompts(self, request: InferenceRequest) -> list[int]:
        per_token, inputs = self._characters_per_token.get(request.model, CHARACTERS_PER_TOKEN), request.inputs
        if request.rows == 1:
            return [int(inputs.characters() / per_token) + 1]
        beside = len(inputs.query or "")
        return [int((beside + len(text)) / per_token) + 1 for text in inputs.texts or ()]


def _characters(request: InferenceRequest) -> int:
    """How many characters a model reads for it: a query beside each text."""
    return request.inputs.characters() + (request.rows - 1) * len(request.inputs.query or "")


def least_answer_bytes(request: InferenceRequest, dimensions: int | None) -> int:
    """How long the answer will be at the least, before any of it is known; ``dimensions`` are those of an embedding."""
    return request.rows * dimensions * NUMBER_BYTES if request.kind is Kind.EMBED and dimensions else 0
