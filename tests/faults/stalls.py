"""Workers that live and do not move: the interpreter is held, a request outlasts its lease, an engine hangs."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

from tests.faults.stage import Figure, Stage, repeated


def hanging_engine(folder: Path, *, hangs: int, idle: float, ids: int) -> list[Figure]:
    """Requests in which every engine hangs: their workers end and are replaced, and the others are answered."""
    watchdog = {"idle_seconds": idle}
    with Stage(folder, optimization={"watchdog": watchdog, "batcher": {"max_batch_size": 1}}) as stage:
        stage.crew.start(3)
        stage.crew.respawning = True
        began = time.time()
        with stage.load(rate=10) as load:
            hung = stage.submit(stage.requests(hangs, "!sleep 3600"), expected="!DeadLettered")
            load.wait_for(ids)
            stage.wait_for(hung, 60 + 3 * hangs * (idle + 30))
        stage.drain(60)
        runs = stage.ledger.runs()
        return [
            *stage.verdict(),
            Figure("hangs", hangs),
            Figure("workers that a request has hung", max(runs[one] for one in hung), at_most=3, at_least=3),
            Figure("second executions of others", repeated(Counter({i: n for i, n in runs.items() if i not in hung}))),
            Figure("given up after, s", max(stage.ledger.ended_at(one) or float("inf") for one in hung) - began),
        ]


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
