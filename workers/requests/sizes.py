"""How many tokens a request will take, estimated without a tokenizer and learnt from what engines report. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from shared.contract import InferenceRequest

CHARACTERS_PER_TOKEN = 4.0
"""First guess; learnt per model."""

LEARNING_RATE = 0.1
MEAN_RATE = 0.05


class TokenEstimator:
    """Estimates requests of several models."""

    def __init__(self, length_buckets: Sequence[int]) -> None:
        self._buckets = length_buckets
        self._characters_per_token: dict[str, float] = {}
        self.mean = 0.0
        """Running mean of the tokens of requests that were started; 0 before the first."""

    def tokens(self, request: InferenceRequest) -> int:
        """Tokens of the prompt and of the longest completion, or completions: each text has one."""
        completions = max(1, len(request.inputs.texts or ())) if request.generates else 0
        return self._prompt(request) + completions * request.params.max_tokens

    def bucket(self, request: InferenceRequest) -> int:
        """Which of the length buckets the prompt falls into."""
        return bisect_left(self._buckets, self._prompt(request))

    def started(self, tokens: int) -> None:
        """A request of this size was started."""
        mean = self.mean or float(tokens)
        self.mean = mean + MEAN_RATE * (tokens - mean)

    def learn(self, request: InferenceRequest, prompt_tokens: int) -> None:
        """The engine says how many tokens the prompt really had."""
        if prompt_tokens:
            seen = request.inputs.characters() / prompt_tokens
            usual = self._characters_per_token.get(request.model, seen)
            self._characters_per_token[request.model] = max(0.1, usual + LEARNING_RATE * (seen - usual))

    def _prompt(self, request: InferenceRequest) -> int:
        per_token = self._characters_per_token.get(request.model, CHARACTERS_PER_TOKEN)
        return int(request.inputs.characters() / per_token) + 1
