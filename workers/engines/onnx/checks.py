"""What a conversion costs: the converted model beside the original, both as they serve, on sample texts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.engines.common.decoding import pad_left
from workers.engines.common.embedding import pool
from workers.engines.common.lengths import Floats, Piece, pad_right, padded
from workers.engines.common.roles import Role
from workers.engines.common.sampling import Logits, Tokens
from workers.engines.common.transformer import TransformerModel
from workers.engines.onnx.files import Cost

STEPS = 6
"""Tokens written on the cache, each after the one the original chose."""

LEFT_AT = 3
"""The step before which rows leave the batch, as they do when answers end."""

SAMPLES = (
    "The train to the coast leaves at nine and takes about two hours.",
    "At what time does the next train to the sea go?",
    "Rain is expected in the north tomorrow, with strong winds along the shore.",
    "What will the weather be like?",
    "Stir the onions slowly in butter until they are golden, then add the rice.",
    "A recipe for risotto",
    "The central bank raised its interest rate by a quarter of a point.",
    "Why did the cost of borrowing go up?",
    "Her violin concerto was first played in the old theatre in 1904.",
    "classical music",
    "The patient was given antibiotics and recovered within a week.",
    "How are infections treated?",
    "The compiler reports an error because the variable was never declared.",
    "undefined variable",
    "Two goals in the last five minutes decided the match.",
    "Who won?",
)


def measured(ours: TransformerModel, theirs: TransformerModel) -> Cost:
    """Compare the conversion with the original: padded batches, and for a model that writes, steps on its cache."""
    pieces = [
        Piece(piece.ids[: theirs.max_context], piece.types[: theirs.max_context])
        for piece in theirs.codec.tokenized(list(SAMPLES))
    ]
    if theirs.role in (Role.DECODER, Role.SEQ2SEQ):
        pairs = list(_written(ours, theirs, pieces))
        return _cost(np.concatenate([a for a, _ in pairs]), np.concatenate([b for _, b in pairs]), None)
    texts = padded(pieces, theirs.pad)
    with ours.running(), theirs.running():
        if theirs.role is Role.CLASSIFIER:
            return _scored(ours.classify(texts), theirs.classify(texts))
        found, expected = ours.encode(texts), theirs.encode(texts)
    pooled = [pool(vectors, texts.mask, theirs.spec) for vectors in (found, expected)]
    alike = _nearest(pooled[0]) == _nearest(pooled[1])
    shown = texts.mask.astype(bool)
    cost = _cost(found[shown], expected[shown], float(alike.mean()))
    return replace(cost, least_cosine=_least_cosine(*pooled))  # what is served is the angle of the whole text


def _written(ours: TransformerModel, theirs: TransformerModel, pieces: list[Piece]) -> Iterator[tuple[Floats, Floats]]:
    """Scores of both, of shape (rows, vocabulary), for the first token and for each step."""
    with ours.running(), theirs.running():
        decoders = (ours.decoding(), theirs.decoding())
        put = pad_left if decoders[0].padding == "left" else pad_right
        ids, mask = put([piece.ids[: _room(theirs)] for piece in pieces], theirs.pad)
        count = len(ids)
        found = [decoder.prefill(ids, mask) for decoder in decoders]
        for step in range(STEPS):
            a, b = (_scores(logits, count) for logits in found)
            chosen_from = np.isfinite(b).all(axis=0)  # forbidden tokens are at minus infinity
            yield a[:, chosen_from], b[:, chosen_from]
            tokens: Tokens = b.argmax(axis=1).astype(np.int64)
            if step == LEFT_AT:
                kept = list(range(0, count, 2))
                for decoder in decoders:
                    decoder.keep(kept)
                tokens, count = tokens[kept], len(kept)
            found = [decoder.step(tokens) for decoder in decoders]


def _scored(ours: Floats, theirs: Floats) -> Cost:
    """Of a head's scores (texts, labels). The angle is that of all scores: a few are too few to have one."""
    if theirs.shape[1] > 1:
        agreement = float((ours.argmax(-1) == theirs.argmax(-1)).mean())
    else:  # a cross-encoder: what counts is which of two texts comes first
        agreement = float(((ours > ours.T) == (theirs > theirs.T)).mean())
    return _cost(ours.reshape(1, -1), theirs.reshape(1, -1), agreement)


def _room(model: TransformerModel) -> int | None:
    return None if model.max_context is None else max(1, model.max_context - STEPS)


def _scores(logits: Logits, count: int) -> Floats:
    return np.stack([logits.row(index) for index in range(count)])


def _nearest(vectors: Floats) -> Tokens:
    """For each text the one whose vector is nearest."""
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    likeness = unit @ unit.T
    np.fill_diagonal(likeness, -np.inf)
    nearest: Tokens = likeness.argmax(axis=1)
    return nearest


def _cost(ours: Floats, theirs: Floats, agreement: float | None) -> Cost:
    """``agreement`` is by the largest score unless it is given."""
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    away = np.abs(ours - theirs) / max(1.0, float(np.abs(theirs).max()))
    if agreement is None:
        agreement = float((ours.argmax(-1) == theirs.argmax(-1)).mean())
    return Cost(float(away.max()), float(away.mean()), _least_cosine(ours, theirs), agreement)


def _least_cosine(ours: NDArray[Any], theirs: NDArray[Any]) -> float:
    lengths = np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1)
    return float(((ours * theirs).sum(-1) / np.maximum(lengths, 1e-12)).min())
