"""Workers that live and do not move: the interpreter's lock is held, or a request takes far longer than its lease."""

from __future__ import annotations

import time
from pathlib import Path

from tests.faults.stage import Figure, Stage, repeated


def held_interpreter(folder: Path, *, holds: int, seconds: float, long: float, ids: int) -> list[Figure]:
    """A C call holds the interpreter's lock for longer than a lease, and a request runs far longer: run once."""
    at_once = min(holds, 10)
    with Stage(folder, fleet={"lease_seconds": 3.0}, optimization={"batcher": {"max_batch_size": 1}}) as stage:
        stage.crew.start(at_once + 3)
        began = time.time()
        stage.submit(stage.requests(1, f"!sleep {long:g}"))
        with stage.load(rate=30) as load:
            for _ in range(holds // at_once):
                stage.submit(held := stage.requests(at_once, f"!hold {seconds:g}"))
                stage.wait_for([one["id"] for one in held], 6 * seconds + 30)
            load.wait_for(ids)
        stage.drain(long + 60)
        return [
            *stage.verdict(),
            Figure("holds", holds),
            Figure("second executions", repeated(stage.ledger.runs()), at_most=0),
            Figure("took, s", time.time() - began),
        ]
