"""Choosing tokens: the distribution that is drawn from is the one that was asked for."""

from __future__ import annotations

import numpy as np
import pytest

from shared.contract import SamplingParams
from workers.engines.common.sampling import ArrayLogits, Sampler, choose

SCORES = np.log(np.array([0.5, 0.25, 0.15, 0.06, 0.04], dtype=np.float32))


def drawn(**params: object) -> np.ndarray:
    """Shares of each token over many draws."""
    sampler = Sampler(SamplingParams.model_validate({"temperature": 1.0, "seed": 1, **params}))
    counts = np.bincount([sampler.draw(SCORES) for _ in range(20_000)], minlength=len(SCORES))
    return counts / counts.sum()


def test_temperature_one_draws_the_models_own_distribution() -> None:
    """Shares are the probabilities."""
    assert drawn() == pytest.approx(np.exp(SCORES), abs=0.015)


def test_top_k_and_top_p_keep_the_likeliest_and_rescale() -> None:
    """Top-k keeps k tokens; top-p the fewest whose probabilities reach p."""
    assert drawn(top_k=2) == pytest.approx([2 / 3, 1 / 3, 0, 0, 0], abs=0.015)
    assert drawn(top_p=0.7) == pytest.approx([2 / 3, 1 / 3, 0, 0, 0], abs=0.015)
    assert drawn(top_p=0.2) == pytest.approx([1, 0, 0, 0, 0])


def test_low_temperature_sharpens() -> None:
    """At half the temperature probabilities are squared and rescaled."""
    squared = np.exp(SCORES) ** 2

    assert drawn(temperature=0.5) == pytest.approx(squared / squared.sum(), abs=0.015)


def test_rows_choose_for_themselves_and_unsound_ones_are_told() -> None:
    """Greedy and sampled rows share a batch; a row with a NaN is marked and hurts no other."""
    rows = np.stack([SCORES, SCORES[::-1], np.full(5, np.nan, dtype=np.float32)])
    greedy, sampled = Sampler(SamplingParams()), Sampler(SamplingParams(temperature=1.0, top_k=1))

    tokens, sound = choose(ArrayLogits(rows), [greedy, sampled, greedy])

    assert tokens[:2] == [0, 4]
    assert sound == [True, True, False]
