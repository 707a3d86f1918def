"""Which weights the workers serve under a model's name: they may have been replaced on a disk while a worker ran."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

from shared.registry import Weights, WorkerInfo

SHOWN = 3
"""Workers of each kind that are named."""


def served(workers: Iterable[WorkerInfo]) -> dict[str, dict[Weights, list[str]]]:
    """By model the weights that are loaded under its name, and where (host and process). The newest come first.

    Equal digests are the same weights: of them the latest change counts.
    """
    found: defaultdict[str, dict[str, tuple[Weights, list[str]]]] = defaultdict(dict)
    for worker in workers:
        for models in worker.weights.values():
            for name, weights in models.items():
                known, where = found[name].get(weights.digest, (weights, []))
                label = f"{worker.host}:{worker.pid}"
                later = max(known, weights, key=lambda one: one.changed)
                found[name][weights.digest] = later, [*where, *([] if label in where else [label])]
    return {
        name: dict(sorted(kinds.values(), key=lambda kind: -kind[0].changed)) for name, kinds in sorted(found.items())
    }


def differences(workers: Iterable[WorkerInfo]) -> dict[str, str]:
    """The models under whose name different weights are served, each with a line that says which, and where."""
    return {
        name: "; ".join(_told(weights, where) for weights, where in kinds.items())
        for name, kinds in served(workers).items()
        if len(kinds) > 1
    }


def newer(weights: Mapping[str, Weights], workers: Iterable[WorkerInfo]) -> dict[str, Weights]:
    """Of these models, by name, those of which other workers have newer weights, and those."""
    found = {}
    for name, kinds in served(workers).items():
        newest = next(iter(kinds))
        mine = weights.get(name)
        if mine is not None and newest.digest != mine.digest and newest.changed > mine.changed:
            same = next((kind for kind in kinds if kind.digest == mine.digest), mine)
            if newest.changed > same.changed:
                found[name] = newest
    return found


def _told(weights: Weights, where: list[str]) -> str:
    when = datetime.fromtimestamp(weights.changed, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    more = f" and {len(where) - SHOWN} more" if len(where) > SHOWN else ""
    return f"{weights.digest} (files of {when}) by {', '.join(where[:SHOWN])}{more}"
