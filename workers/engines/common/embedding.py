"""Embeddings: token vectors into one vector a text, the same for every engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from shared.contract import InferenceRequest, Usage
from shared.errors import EngineError
from shared.settings import ModelSpec
from workers.engines.base import Emit, EngineOutput, OnTokens
from workers.engines.common.lengths import Floats, Padded, run_together
from workers.engines.common.sampling import Tokens
from workers.engines.common.text import TextCodec

Encode = Callable[[Padded], Floats]
"""Texts to token vectors of shape (texts, longest, size)."""


def pool(vectors: Floats, mask: Tokens, spec: ModelSpec) -> Floats:
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
    requests: Sequence[InferenceRequest], codec: TextCodec, spec: ModelSpec, pad: int, encode: Encode, emit: Emit,
    tell: OnTokens | None = None,
) -> None:  # fmt: skip
    """Answer embed requests together."""
    started = time.perf_counter()

    def forward(texts: Padded) -> Floats:
        return pool(encode(texts), texts.mask, spec)

    for member in run_together(requests, codec.encode_texts, pad, forward, emit, tell):
        if not np.isfinite(member.vectors).all():
            emit(member.index, EngineError("the embedding is not finite"))
            continue
        outputs = {"embeddings": member.vectors.tolist(), "dimensions": int(member.vectors.shape[1])}
        taken_ms = (time.perf_counter() - started) * 1000
        emit(member.index, EngineOutput(outputs, Usage(prompt_tokens=member.tokens), prefill_ms=taken_ms))
