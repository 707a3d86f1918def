"""How large requests and their answers are, estimated and learnt from what engines report. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

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


class Size(NamedTuple):
    """How large a request is."""

    tokens: list[int]
    """Of each row, its prompt and its longest completion together."""
    bucket: int
    """That of the longest prompt, among the length buckets."""
    read: int
    """Characters that a model reads for it: a query beside each text."""
    written: int
    """Most tokens of the answer to a row."""


class TokenEstimator:
    """Estimates requests of several models."""

    def __init__(self, length_buckets: Sequence[int]) -> None:
        self._buckets = length_buckets
        self._characters_per_token: dict[str, float] = {}
        self.rows = Typical()
        """Rows of requests that were started."""
        self.tokens = Typical()
        """Tokens of requests that were started."""

    def measured(self, request: InferenceRequest) -> Size:
        """How large a request is, as far as that is known without a tokenizer."""
        inputs, rows = request.inputs, request.rows
        written = request.params.max_tokens if request.generates else 0
        per_token = self._characters_per_token.get(request.model, CHARACTERS_PER_TOKEN)
        read = inputs.characters()
        if rows == 1:
            prompt = int(read / per_token) + 1
            return Size([prompt + written], bisect_left(self._buckets, prompt), read, written)
        beside = len(inputs.query or "")
        prompts = [int((beside + len(text)) / per_token) + 1 for text in inputs.texts or ()]
        bucket = bisect_left(self._buckets, max(prompts))
        return Size([prompt + written for prompt in prompts], bucket, read + (rows - 1) * beside, written)

    def started(self, tokens: Sequence[int]) -> None:
        """A request with rows of these sizes was started."""
        self.rows.seen(len(tokens))
        self.tokens.seen(sum(tokens))

    def learn(self, model: str, read: int, prompt_tokens: int) -> None:
        """The engine says how many tokens the characters really were that a model has read."""
        if prompt_tokens:
            seen = read / prompt_tokens
            usual = self._characters_per_token.get(model, seen)
            self._characters_per_token[model] = max(0.1, usual + LEARNING_RATE * (seen - usual))


def least_answer_bytes(request: InferenceRequest, dimensions: int | None) -> int:
    """How long the answer will be at the least, before any of it is known; ``dimensions`` are those of an embedding."""
    return request.rows * dimensions * NUMBER_BYTES if request.kind is Kind.EMBED and dimensions else 0
