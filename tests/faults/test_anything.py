"""What nobody imagined, in short: a dozen compositions of callers, fleets and faults, and how such are drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.anything.composition import Composition
from tests.faults.anything.draw import STYLES, compose
from tests.faults.anything.run import anomalies_of
from tests.faults.anything.shrink import shrunk
from tests.faults.suite import SCENARIOS


@pytest.mark.timeout(170)
@pytest.mark.parametrize("seed", SCENARIOS["anything"].short["seeds"])
def test_what_must_always_hold(seed: int, tmp_path: Path) -> None:
    """Each accepted id ends once, in time and truly; who waits is told; limits are kept; nothing is left behind."""
    made = compose(seed)

    found = anomalies_of(made, tmp_path / "run")

    assert found == [], "\n".join([str(made), *map(str, found), f"again: make faults ONLY=anything SEED={seed}"])


def test_a_seed_is_one_composition() -> None:
    """It is drawn alike each time, and its text gives it back; all styles are drawn."""
    drawn = [compose(seed) for seed in range(200)]

    assert drawn == [compose(seed) for seed in range(200)]
    assert [Composition.from_json(made.to_json()) for made in drawn] == drawn
    assert {made.style for made in drawn} == set(STYLES)


def test_what_fails_is_made_smaller() -> None:
    """What it fails without is left out: here all but one of the faults and of the requests."""
    made = next(made for made in map(compose, range(100)) if len(made.faults) > 1 and len(made.asks()) > 20)
    culprit, fault = made.asks()[-1], made.faults[0]

    small = shrunk(made, lambda one: culprit.id in {ask.id for ask in one.asks()} and fault in one.faults, 30)

    assert [ask.id for ask in small.asks()] == [culprit.id]
    assert small.faults == (fault,)
