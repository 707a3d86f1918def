"""Running many texts at once: those of like length side by side, the same for every engine and every kind of answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.contract import InferenceRequest
from shared.errors import FleetError
from workers.engines.base import Emit, NewTokens, OnTokens
from workers.engines.common.sampling import Tokens

TEXTS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Piece:
    """One text, or one pair of texts, as tokens. ``types`` is 0 for the first text's tokens and 1 for the second's."""

    ids: Sequence[int]
    types: Sequence[int]


@dataclass(frozen=True, slots=True)
class Padded:
    """Pieces side by side: each array has the shape (pieces, longest), padded on the right; mask is 0 at padding."""

    ids: Tokens
    mask: Tokens
    types: Tokens


Floats = NDArray[np.float32]
Forward = Callable[[Padded], Floats]
"""One vector for each piece, of shape (pieces, size)."""


@dataclass(frozen=True, slots=True)
class Member:
    """What a batch has found for one request: a vector for each of its pieces, in the order they were given."""

    index: int
    request: InferenceRequest
    vectors: Floats
    tokens: int


def pad_right(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tokens, Tokens]:
    """Ids and mask of shape (rows, longest); 0 in the mask is padding."""
    longest = max(map(len, rows))
    ids = np.full((len(rows), longest), pad, dtype=np.int64)
    mask = np.zeros((len(rows), longest), dtype=np.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = row
        mask[place, : len(row)] = 1
    return ids, mask


def padded(pieces: Sequence[Piece], pad: int) -> Padded:
    """The pieces side by side."""
    ids, mask = pad_right([piece.ids for piece in pieces], pad)
    types, _ = pad_right([piece.types for piece in pieces], 0)
    return Padded(ids, mask, types)


def run_together(
    requests: Sequence[InferenceRequest],
    encode: Callable[[InferenceRequest], Sequence[Piece]],
    pad: int,
    forward: Forward,
    emit: Emit,
    tell: OnTokens | None = None,
) -> Iterator[Member]:
    """Run the pieces of all requests, sorted by length so that little padding is computed; then each request's vectors.

    A request that ``encode`` refuses is emitted with its error and takes no part. Where there is more than can be run
    at once, ``tell`` hears of each part but the last, whose answers follow, which requests had pieces in it.
    """
    taken: dict[int, slice] = {}
    pieces: list[Piece] = []
    owners: list[int] = []
    for index, request in enumerate(requests):
        try:
            own = encode(request)
        except FleetError as error:
            emit(index, error)
            continue
        taken[index] = slice(len(pieces), len(pieces) + len(own))
        pieces.extend(own)
        owners.extend([index] * len(own))
    found: list[Floats] = [np.empty(0, dtype=np.float32)] * len(pieces)
    order = sorted(range(len(pieces)), key=lambda place: len(pieces[place].ids))
    for first in range(0, len(order), TEXTS_AT_ONCE):
        places = order[first : first + TEXTS_AT_ONCE]
        vectors = forward(padded([pieces[place] for place in places], pad))
        for place, vector in zip(places, vectors, strict=True):
            found[place] = vector
        if tell is not None and first + TEXTS_AT_ONCE < len(order):
            tell([NewTokens(requests[index].id, ()) for index in sorted({owners[place] for place in places})])
    for index, mine in taken.items():
        tokens = sum(len(piece.ids) for piece in pieces[mine])
        yield Member(index, requests[index], np.stack(found[mine]), tokens)
