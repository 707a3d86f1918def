"""Masks as additive biases, of shape (rows, 1, queries, keys): 0 where a token is seen, very negative where not.

They are made outside of the graphs. That leaves nothing data-dependent to trace, and left padding, right padding,
cached keys and several texts in one row all work the same for any architecture whose attention takes a bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from workers.engines.common.lengths import Floats, Padded
from workers.engines.common.sampling import Tokens

NEGATIVE = np.float32(np.finfo(np.float32).min)
SEEN = np.float32(0.0)

ROW_TOKENS = 64
"""Short texts share rows of this many tokens: longer rows waste attention, shorter ones leave more padding."""


def causal_bias(mask: Tokens, queries: int) -> Floats:
    """The bias for the last ``queries`` tokens of rows with this mask (rows, keys): no padding, nothing ahead."""
    keys = mask.shape[1]
    ahead = np.arange(keys)[None, :] > (np.arange(queries) + keys - queries)[:, None]
    hidden = ahead[None, None] | (mask == 0)[:, None, None, :]
    return np.where(hidden, NEGATIVE, SEEN)


def padding_bias(mask: Tokens, queries: int | None = None) -> Floats:
    """The bias for an encoder, or for ``queries`` tokens that look at what it has read: no padding."""
    rows, keys = mask.shape
    bias = np.where((mask == 0)[:, None, None, :], NEGATIVE, SEEN)
    return np.ascontiguousarray(np.broadcast_to(bias, (rows, 1, keys if queries is None else queries, keys)))


@dataclass(frozen=True, slots=True)
class Packed:
    """Texts behind one another in rows, so that hardly any padding is computed. Arrays have the shape (rows, width).

    ``owner`` is the text that a token belongs to (-1: none), ``place`` its position in that text; ``starts`` says for
    each text in which row it is and where it begins.
    """

    ids: Tokens
    types: Tokens
    place: Tokens
    owner: Tokens
    starts: Sequence[tuple[int, int]]

    def bias(self) -> Floats:
        """Each token sees its own text only."""
        return np.where(self.owner[:, None, :, None] == self.owner[:, None, None, :], SEEN, NEGATIVE)

    def unpacked(self, vectors: Floats, mask: Tokens) -> Floats:
        """Token vectors (rows, width, size) as (texts, longest, size); 0 at the padding that ``mask`` shows."""
        found = np.zeros((*mask.shape, vectors.shape[-1]), dtype=np.float32)
        for text, ((row, start), length) in enumerate(zip(self.starts, mask.sum(axis=1), strict=True)):
            found[text, :length] = vectors[row, start : start + length]
        return found


def pack(texts: Padded, pad: int, row_tokens: int = ROW_TOKENS) -> Packed:
    """Put texts into as few rows as first-fit finds, longest text first."""
    lengths: NDArray[np.int64] = texts.mask.sum(axis=1)
    room = max(row_tokens, int(lengths.max()))
    filled: list[int] = []
    starts = [(0, 0)] * len(lengths)
    for text in np.argsort(-lengths, kind="stable"):
        length = int(lengths[text])
        row = next((row for row, used in enumerate(filled) if used + length <= room), len(filled))
        if row == len(filled):
            filled.append(0)
        starts[text] = (row, filled[row])
        filled[row] += length
    shape = (len(filled), max(filled))
    packed = Packed(
        np.full(shape, pad, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int64),
        np.full(shape, -1, np.int64), starts,
    )  # fmt: skip
    for text, (row, start) in enumerate(starts):
        length = int(lengths[text])
        here = slice(start, start + length)
        packed.ids[row, here] = texts.ids[text, :length]
        packed.types[row, here] = texts.types[text, :length]
        packed.place[row, here] = np.arange(length)
        packed.owner[row, here] = text
    return packed
