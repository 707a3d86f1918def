"""Workers are stopped as a supervisor stops them, one after the other; and all workers of an engine are gone."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from tests.faults.stage import Figure, Stage
from tests.support.waiting import eventually

GRACE = 10.0


def rolling_restart(folder: Path, *, workers: int, rounds: int, ids: int) -> list[Figure]:
    """Every worker is sent SIGTERM under load, one after the other: nothing fails, and each ends within its grace."""
    exits: list[float] = []
    failed = 0
    with Stage(
        folder,
        optimization={"fake": {"latency_ms": 200}},
        monitoring={"server": {"graceful_shutdown_timeout": GRACE}},
    ) as stage:
        stage.crew.start(workers)
        stage.crew.respawning = True
        with stage.load(rate=60) as load:
            for _ in range(rounds):
                for member in stage.crew.running():
                    sent = time.time()
                    member.signal(signal.SIGTERM)
                    stage.crew.wait_ended([member], 3 * GRACE)
                    exits.append((member.ended or float("inf")) - sent)
                    failed += member.exit_code != 0
                    stage.crew.wait_live()
            load.wait_for(ids)
        stage.drain(60)
        return [
            *stage.verdict(),
            Figure("workers stopped", len(exits)),
            Figure("exits with an error", failed, at_most=0),
            Figure("slowest exit, s", max(exits), at_most=GRACE),
            Figure("slowest answer, s", max(stage.ledger.latencies())),
        ]


def engine_gone(folder: Path, *, ids: int, rescue: float = 30.0, lease: float = 30.0) -> list[Figure]:
    """All workers of an engine are killed: what it had goes to the next engine, or fails and says why."""
    with Stage(
        folder,
        fleet={
            "lease_seconds": lease, "rescue_after_seconds": rescue, "heartbeat_seconds": min(2.0, rescue / 10),
        },
        optimization={"fake": {"latency_ms": 20}},
    ) as stage:  # fmt: skip
        stage.crew.start(1, "pytorch")
        doomed = stage.crew.start(2, "fake")
        stage.submit(stage.requests(ids - ids // 4))
        stranded = stage.submit(stage.requests(ids // 4, model="only"), expected="!NoEngineAvailable")
        eventually(lambda: len(stage.busy(doomed)) == len(doomed), what="both at work")
        killed = time.time()
        stage.crew.kill(doomed)
        stage.drain(rescue + lease + 30)
        ended = {one: stage.ledger.ended_at(one) or float("inf") for one in stage.ledger.accepted}
        served = [one for one in ended if one not in stranded]
        return [
            *stage.verdict(),
            Figure("last rerouted answer after, s", max(ended[one] for one in served) - killed, at_most=rescue + 15),
            Figure("last failure after, s", max(ended[one] for one in stranded) - killed, at_most=rescue + 15),
        ]
