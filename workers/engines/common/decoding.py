"""The decode loop: one for every engine that can prefill a batch and take a step.

All rows write their next token at the same place. What a step has made is told once for all of them; then those that it
finished are answered, a request with its last row. Finished rows leave the batch when a fair share of it is done.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Container, Sequence
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from shared.contract import InferenceRequest, Kind, Usage
from shared.errors import Cancelled, EngineError, FleetError
from workers.engines.base import Emit, EngineOutput, NewTokens, OnTokens
from workers.engines.common.lengths import pad_right
from workers.engines.common.roles import REWRITING
from workers.engines.common.sampling import Logits, Sampler, Tokens, choose, log_probabilities
from workers.engines.common.text import TextCodec

KEEP_SHARE = 0.75
"""Finished rows leave when the others are at most this share of the batch: leaving costs a copy of the cache."""


class Decoding(ABC):
    """One batch on its way through a decoder, with its key-value cache."""

    padding: ClassVar[Literal["left", "right"]] = "left"
    """Where prompts are padded: left where the answer goes on from them, right where an encoder reads them."""

    @abstractmethod
    def prefill(self, ids: Tokens, mask: Tokens) -> Logits:
        """Read the prompts: ids and mask of shape (rows, longest). Scores of the first token of each answer."""

    @abstractmethod
    def step(self, tokens: Tokens) -> Logits:
        """Append one token to each row, of shape (rows,). Scores of the token after it."""

    @abstractmethod
    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in this order."""


class _Row:
    """One prompt in the batch."""

    def __init__(self, member: _Member, index: int, prompt: list[int], room: int | None) -> None:
        self.member = member
        self.index = index
        self.prompt = prompt
        params = member.request.params
        self.most = params.max_tokens if room is None else min(params.max_tokens, room)
        self.sampler = Sampler(params)
        self.tokens: list[int] = []
        self.logprobs: list[dict[str, object]] = []
        self.text: str | None = None
        """The answer where a stop string cuts it; otherwise all tokens are its text."""
        self.reason = ""
        self.open = True


class _Member:
    """One request in the batch: one row, or a row for each of its texts."""

    def __init__(self, index: int, request: InferenceRequest, prompts: list[list[int]], limit: int | None) -> None:
        self.index = index
        self.request = request
        # A decoder's prompt takes room from the answer. What an encoder reads does not; a forced first token does.
        taken = [1 if request.kind in REWRITING else len(prompt) for prompt in prompts]
        rooms = [None if limit is None else limit - used for used in taken]
        self.rows = [
            _Row(self, place, prompt, room) for place, (prompt, room) in enumerate(zip(prompts, rooms, strict=True))
        ]

    def outputs(self) -> dict[str, object]:
        """The answer, once every row is finished."""
        first = self.rows[0]
        if self.request.kind in REWRITING:
            return {
                "text": first.text,
                "texts": [row.text for row in self.rows],
                "token_ids": [row.tokens for row in self.rows],
                "finish_reasons": [row.reason for row in self.rows],
            }
        outputs: dict[str, object] = {"text": first.text, "token_ids": first.tokens, "finish_reason": first.reason}
        if self.request.params.logprobs is not None:
            outputs["logprobs"] = first.logprobs
        if self.request.kind is Kind.CHAT:
            outputs["message"] = {"role": "assistant", "content": first.text}
        return outputs

    def usage(self) -> Usage:
        """Tokens read and written."""
        return Usage(
            prompt_tokens=sum(len(row.prompt) for row in self.rows),
            completion_tokens=sum(len(row.tokens) for row in self.rows),
        )


def generate(
    requests: Sequence[InferenceRequest],
    codec: TextCodec,
    decoding: Decoding,
    eos: frozenset[int],
    pad: int,
    emit: Emit,
    tell: OnTokens | None = None,
    unwanted: Container[str] = (),
) -> None:
    """Answer requests whose answers are written together; see :meth:`workers.engines.base.LoadedModel.infer`.

    Requests whose ids come to be in ``unwanted`` meanwhile end as cancelled at the next token. Each row has a sampler
    of its own: a text is answered as if it were the only one of its request.
    """
    started = time.perf_counter()
    rows: list[_Row] = []
    for index, request in enumerate(requests):
        try:
            prompts = codec.prompts(request)
        except FleetError as error:
            emit(index, error)
            continue
        rows.extend(_Member(index, request, prompts, codec.max_context).rows)
    if rows:
        _Loop(rows, codec, decoding, eos, pad, emit, tell, unwanted, started).run()


def pad_left(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tokens, Tokens]:
    """Ids and mask of shape (rows, longest); 0 in the mask is padding."""
    longest = max(map(len, prompts))
    ids = np.full((len(prompts), longest), pad, dtype=np.int64)
    mask = np.zeros((len(prompts), longest), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def positions(mask: Tokens) -> NDArray[np.int64]:
    """The position of each token among those that are not padding; padding is put at 0."""
    place: NDArray[np.int64] = np.maximum(mask.cumsum(axis=1) - 1, 0)
    return place


class _Loop:
    def __init__(
        self, rows: list[_Row], codec: TextCodec, decoding: Decoding, eos: frozenset[int], pad: int, emit: Emit,
        tell: OnTokens | None, unwanted: Container[str], started: float,
    ) -> None:  # fmt: skip
        self._rows = rows
        self._codec = codec
        self._decoding = decoding
        self._eos = eos
        self._pad = pad
        self._emit = emit
        self._tell = tell
        self._unwanted = unwanted
        self._started = started
        self._first_token_at = 0.0

    def run(self) -> None:
        padded = pad_left if self._decoding.padding == "left" else pad_right
        logits = self._decoding.prefill(*padded([row.prompt for row in self._rows], self._pad))
        while True:
            chosen, sound = choose(logits, [row.sampler for row in self._rows])
            self._first_token_at = self._first_token_at or time.perf_counter()
            self._advance(chosen, sound, logits)
            still_open = [place for place, row in enumerate(self._rows) if row.open]
            if not still_open:
                return
            if len(still_open) <= KEEP_SHARE * len(self._rows):
                self._decoding.keep(still_open)
                chosen = [chosen[place] for place in still_open]
                self._rows = [self._rows[place] for place in still_open]
            logits = self._decoding.step(np.array(chosen, dtype=np.int64))

    def _advance(self, chosen: Sequence[int], sound: Sequence[bool], logits: Logits) -> None:
        """Give each open row its token, tell of them, and answer for the rows that end with them."""
        grown: list[_Row] = []
        for place, (row, token, is_sound) in enumerate(zip(self._rows, chosen, sound, strict=True)):
            if row.open and self._take(row, token, is_sound, logits, place):
                grown.append(row)
        if self._tell is not None:
            made = [NewTokens(row.member.request.id, row.tokens[-1:], row.index) for row in grown if row.open]
            if made:
                self._tell(made)
        for row in self._rows:
            if row.open and row.reason:
                self._finish(row)

    def _take(self, row: _Row, token: int, sound: bool, logits: Logits, place: int) -> bool:
        """Whether the row has one token more; where it ends, its ``reason`` says so."""
        request = row.member.request
        params = request.params
        if not sound or request.id in self._unwanted:
            for one in row.member.rows:
                one.open = False
            self._emit(row.member.index, Cancelled() if sound else EngineError("the model's scores are not finite"))
            return False
        if token in self._eos and not params.ignore_eos:
            row.reason = "stop"
            return False
        row.tokens.append(token)
        if params.logprobs is not None:
            row.logprobs.append(log_probabilities(logits.row(place), token, params.logprobs))
        row.text = self._codec.stopped(row.tokens, params.stop)
        if row.text is not None:
            row.reason = "stop"
        elif len(row.tokens) >= row.most:
            row.reason = "length"
        return True

    def _finish(self, row: _Row) -> None:
        row.open = False
        if row.text is None:
            row.text = self._codec.decode(row.tokens)
        member = row.member
        if any(one.open for one in member.rows):
            return
        self._emit(
            member.index,
            EngineOutput(
                member.outputs(),
                member.usage(),
                prefill_ms=(self._first_token_at - self._started) * 1000,
                decode_ms=(time.perf_counter() - self._first_token_at) * 1000,
            ),
        )
