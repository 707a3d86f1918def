"""Runs seeds one after the other; one that fails is told of, kept, and made smaller."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tests.faults.anything.checks import Anomaly
from tests.faults.anything.composition import Composition
from tests.faults.anything.draw import compose
from tests.faults.anything.run import anomalies_of
from tests.faults.anything.shrink import shrunk
from tests.faults.stage import Figure

SHRINK_SECONDS = 180.0


def run_seeds(folder: Path, *, seeds: Iterable[int], shrink: float = SHRINK_SECONDS) -> list[Figure]:
    """The compositions of these seeds; how many there were, and the anomalies by the check that has found them."""
    found: Counter[str] = Counter()
    failed, count, began = 0, 0, time.monotonic()
    for seed in seeds:
        anomalies = run_one(folder, compose(seed), shrink)
        found.update({anomaly.check for anomaly in anomalies})
        failed += bool(anomalies)
        count += 1
    return [
        Figure("compositions", count),
        Figure("compositions with an anomaly", failed, at_most=0),
        *(Figure(f"with an anomaly of {check}", number) for check, number in found.most_common()),
        Figure("seconds each", round((time.monotonic() - began) / max(1, count), 1)),
    ]


def run_one(folder: Path, made: Composition, shrink: float = 0.0) -> list[Anomaly]:
    """Run a composition. What fails stays in the folder, and so does the smaller one that fails alike."""
    place = folder / f"seed-{made.seed}"
    shutil.rmtree(place, ignore_errors=True)
    began = time.monotonic()
    anomalies = anomalies_of(made, place)
    mark = "FAILED" if anomalies else "ok"
    print(f"  {mark} {made}; {time.monotonic() - began:.1f} s", flush=True)
    for anomaly in anomalies:
        print(f"    {anomaly}", flush=True)
    if not anomalies:
        shutil.rmtree(place, ignore_errors=True)
        return []
    (place / "composition.json").write_text(made.to_json())
    print(f"    again: make faults ONLY=anything SEED={made.seed}", flush=True)
    if shrink:
        small = _smaller(place, made, {anomaly.check for anomaly in anomalies}, shrink)
        if small is not made:
            kept = folder / f"seed-{made.seed}.json"
            kept.write_text(small.to_json())
            print(f"    smaller: {small}\n    again: make faults ONLY=anything COMPOSITION={kept}", flush=True)
    return anomalies


def _smaller(place: Path, made: Composition, checks: set[str], seconds: float) -> Composition:
    """It without what it fails without."""
    trial = place.with_name(f"{place.name}-smaller")

    def fails(candidate: Composition) -> bool:
        shutil.rmtree(trial, ignore_errors=True)
        return bool(checks & {anomaly.check for anomaly in anomalies_of(candidate, trial)})

    try:
        return shrunk(made, fails, seconds)
    finally:
        shutil.rmtree(trial, ignore_errors=True)
