"""Batches on their way through PyTorch models: causal language models, and sequence-to-sequence models."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from workers.engines.common.decoding import Decoding, positions
from workers.engines.common.sampling import Logits, Scores, Tokens
from workers.engines.common.weights import Writing

Forward = Callable[..., Any]
"""The model's forward pass, compiled or as it is."""


class TensorLogits(Logits):
    """Scores on the model's device; only what is asked for leaves it."""

    def __init__(self, scores: torch.Tensor) -> None:
        self._scores = scores

    def best(self) -> tuple[Tokens, Scores]:
        """The most likely token of each row and its score."""
        values, tokens = self._scores.max(dim=-1)
        return tokens.cpu().numpy(), values.float().cpu().numpy()

    def row(self, index: int) -> Scores:
        """The scores of one row."""
        row: Scores = self._scores[index].float().cpu().numpy()
        return row


class TorchDecoding(Decoding):
    """One batch through a causal language model."""

    def __init__(self, model: Any, forward: Forward, device: torch.device) -> None:
        self._run = forward
        self._device = device
        self._last_only = (
            {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        )
        self._cache: Any = None
        self._mask = torch.empty(0)
        self._next = torch.empty(0)

    def prefill(self, ids: Tokens, mask: Tokens) -> Logits:
        """Read the prompts."""
        place = positions(mask)
        self._mask = torch.from_numpy(mask).to(self._device)
        self._next = torch.from_numpy(place[:, -1:] + 1).to(self._device)
        return self._forward(torch.from_numpy(ids).to(self._device), torch.from_numpy(place).to(self._device))

    def step(self, tokens: Tokens) -> Logits:
        """Append one token to each row."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        at = self._next
        self._next = at + 1
        return self._forward(torch.from_numpy(tokens).to(self._device)[:, None], at)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        index = torch.tensor(rows, device=self._device)
        self._cache.batch_select_indices(index)
        self._mask = self._mask[index]
        self._next = self._next[index]

    def _forward(self, ids: torch.Tensor, place: torch.Tensor) -> Logits:
        out = self._run(
            input_ids=ids, attention_mask=self._mask, position_ids=place, past_key_values=self._cache, use_cache=True,
            **self._last_only,
        )  # fmt: skip
        self._cache = out.past_key_values
        return TensorLogits(out.logits[:, -1])


class TorchRewriting(Decoding):
    """One batch through a sequence-to-sequence model: the encoder once, then the decoder token by token."""

    padding: ClassVar[Literal["left", "right"]] = "right"

    def __init__(self, model: Any, forward: Forward, device: torch.device, writing: Writing) -> None:
        self._model = model
        self._run = forward
        self._device = device
        self._start = writing.start
        self._forbidden = list(writing.forbidden)
        self._cache: Any = None
        self._mask = torch.empty(0)
        self._read = torch.empty(0)

    def prefill(self, ids: Tokens, mask: Tokens) -> Logits:
        """Read the texts, and give the decoder what it starts from."""
        # Left to itself T5 makes a cache for as many layers as the encoder has, and the decoder may have more.
        self._cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        self._mask = torch.from_numpy(mask).to(self._device)
        source = torch.from_numpy(ids).to(self._device)
        self._read = self._model.get_encoder()(input_ids=source, attention_mask=self._mask).last_hidden_state
        return self._forward(torch.tensor(self._start, device=self._device).repeat(len(ids), 1))

    def step(self, tokens: Tokens) -> Logits:
        """Append one token to each row."""
        return self._forward(torch.from_numpy(tokens).to(self._device)[:, None])

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        index = torch.tensor(rows, device=self._device)
        self._cache.batch_select_indices(index)
        self._mask = self._mask[index]
        self._read = self._read[index]

    def _forward(self, ids: torch.Tensor) -> Logits:
        out = self._run(
            encoder_outputs=(self._read,), attention_mask=self._mask, decoder_input_ids=ids,
            past_key_values=self._cache, use_cache=True,
        )  # fmt: skip
        self._cache = out.past_key_values
        scores = out.logits[:, -1]
        scores[:, self._forbidden] = float("-inf")
        return TensorLogits(scores)
