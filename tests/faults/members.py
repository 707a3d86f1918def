"""One member of a batch is bad: it fails alone, whether the engine fails over it or the worker dies of it."""

from __future__ import annotations

from pathlib import Path

from tests.faults.stage import Figure, Stage

SIZE = 16


def bad_members(folder: Path, *, batches: int, deadly: int, lease: float = 5.0) -> list[Figure]:
    """Batches with a member that crashes the engine, and batches with one that kills the worker."""
    with Stage(folder, fleet={"lease_seconds": lease, "sweep_seconds": 0.5}) as stage:
        stage.crew.start(3)
        stage.crew.respawning = True
        for _ in range(batches):
            submit_batch(stage, "!crash")
        stage.drain(60)
        for _ in range(deadly):
            submit_batch(stage, "!die")
            stage.drain(4 * lease + 30)
        verdict = stage.ledger.verdict()
        innocent = [one for one in verdict.unexpected if stage.ledger.records[one][0].answer.startswith("!")]
        return [
            *stage.verdict(),
            Figure("batches with a bad member", batches),
            Figure("batches with a deadly member", deadly),
            Figure("others that failed with it", len(innocent), at_most=0),
        ]


def submit_batch(stage: Stage, prompt: str) -> None:
    """A full batch at once, with a bad one in its middle."""
    others = stage.requests(SIZE - 1)
    stage.submit([*others[: SIZE // 2], *stage.requests(1, prompt), *others[SIZE // 2 :]])
