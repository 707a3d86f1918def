"""Embeddings: token vectors into one vector a text, the same for every engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from shared.contract import InferenceRequest, Usage
from shared.errors import EngineError, FleetError
from shared.settings import ModelSpec
from workers.engines.base import Emit, EngineOutput
from workers.engines.sampling import Tokens
from workers.engines.text import TextCodec

Vectors = NDArray[np.float32]
Encode = Callable[[Tokens, Tokens], Vectors]
"""Ids and mask of shape (texts, longest), right padded, to token vectors of shape (texts, longest, size)."""

TEXTS_AT_ONCE = 64


def pad_right(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tokens, Tokens]:
    """Ids and mask of shape (rows, longest); 0 in the mask is padding."""
    longest = max(map(len, rows))
    ids = np.full((len(rows), longest), pad, dtype=np.int64)
    mask = np.zeros((len(rows), longest), dtype=np.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = row
        mask[place, : len(row)] = 1
    return ids, mask


def pool(vectors: Vectors, mask: Tokens, spec: ModelSpec) -> Vectors:
    """One vector a text, of shape (texts, size): mean over the tokens, the first, or the last one."""
    if spec.pooling == "cls":
        pooled = vectors[:, 0]
    elif spec.pooling == "last":
        pooled = vectors[np.arange(len(vectors)), mask.sum(axis=1) - 1]
    else:
        weights = mask[:, :, None].astype(np.float32)
        pooled = (vectors * weights).sum(axis=1) / weights.sum(axis=1)
    if spec.normalize:
        pooled = pooled / np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), 1e-12)
    return pooled.astype(np.float32)


def embed(
    requests: Sequence[InferenceRequest], codec: TextCodec, spec: ModelSpec, pad: int, encode: Encode, emit: Emit
) -> None:
    """Answer embed requests together. Texts of like length run side by side, so that little padding is computed."""
    started = time.perf_counter()
    texts: list[tuple[int, list[int]]] = []
    for index, request in enumerate(requests):
        try:
            texts.extend((index, ids) for ids in codec.encode_texts(request))
        except FleetError as error:
            emit(index, error)
    found: list[Vectors | None] = [None] * len(texts)
    order = sorted(range(len(texts)), key=lambda place: len(texts[place][1]))
    for first in range(0, len(order), TEXTS_AT_ONCE):
        places = order[first : first + TEXTS_AT_ONCE]
        ids, mask = pad_right([texts[place][1] for place in places], pad)
        for place, vector in zip(places, pool(encode(ids, mask), mask, spec), strict=True):
            found[place] = vector
    taken_ms = (time.perf_counter() - started) * 1000
    for index in dict.fromkeys(owner for owner, _ in texts):
        mine = [place for place, (owner, _) in enumerate(texts) if owner == index]
        vectors = np.stack([vector for place in mine if (vector := found[place]) is not None])
        if not np.isfinite(vectors).all():
            emit(index, EngineError("the embedding is not finite"))
            continue
        tokens = sum(len(texts[place][1]) for place in mine)
        outputs = {"embeddings": vectors.tolist(), "dimensions": int(vectors.shape[1])}
        emit(index, EngineOutput(outputs, Usage(prompt_tokens=tokens), prefill_ms=taken_ms))
