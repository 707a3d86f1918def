"""Workers are killed: while they run requests, in their sleep, at random, around a hop, and by a request."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import psutil

from tests.faults.crew import Member
from tests.faults.stage import Figure, Stage, percentile, repeated
from tests.support.waiting import eventually

SWIFT = {"lease_seconds": 1.5, "sweep_seconds": 0.3, "max_deliveries": 1000}
"""Short leases, and nobody is given up: for faults that strike a request again and again."""


RUN_SECONDS = 0.3

BACK_SECONDS = 3.0
"""How soon after the end of its worker a request is to run again."""


def sigkill_mid_request(folder: Path, *, kills: int, ids: int) -> list[Figure]:
    """Workers are killed while they run requests beside others: the others have answered them within seconds."""
    rng = random.Random(1)
    struck: dict[str, float] = {}
    with Stage(
        folder, fleet={"max_deliveries": 10}, optimization={"fake": {"latency_ms": RUN_SECONDS * 1000}}
    ) as stage:
        stage.crew.start(max(2, min(kills, 8)))
        stage.crew.respawning = True
        with stage.load(rate=50) as load:
            for _ in range(kills):
                stage.crew.wait_live()  # else nobody may be there to take over
                busy = eventually(lambda: stage.busy(stage.crew.running()), what="a busy worker")
                victim = rng.choice(list(busy))
                struck.update(dict.fromkeys(busy[victim], time.time()))
                stage.crew.kill([victim])
            load.wait_for(ids)
        stage.drain(90)
        waits = [
            ended - killed
            for request_id, killed in struck.items()
            if (ended := stage.ledger.ended_at(request_id) or float("inf")) > killed
        ]
        slowest = max(waits, default=float("inf"))
        return [
            *stage.verdict(),
            Figure("kills", kills),
            Figure("requests under way when their worker was killed", len(waits), at_least=kills / 2),
            Figure("slowest answer after the kill, s", slowest, at_most=BACK_SECONDS + RUN_SECONDS),
            Figure("slowest answer of all, s", max(stage.ledger.latencies())),
            Figure("most runs of one request", max(stage.ledger.runs().values())),
        ]


def sigkill_asleep(folder: Path, *, kills: int, at_once: int, ids: int) -> list[Figure]:
    """Idle workers are frozen, requests are published, the workers are killed: their successors answer."""
    rounds = kills // at_once
    with Stage(folder, fleet={"lease_seconds": 5.0}) as stage:
        members = stage.crew.start(at_once)
        stage.crew.respawning = True
        for _ in range(rounds):
            stage.crew.signal(signal.SIGSTOP, members)
            eventually(lambda them=members: all(map(is_stopped, them)), what="frozen workers")
            stage.submit(stage.requests(ids // rounds))
            stage.crew.kill(members)
            stage.drain(60)
            members = stage.crew.running()
            stage.crew.wait_live(members)
        return [
            *stage.verdict(),
            Figure("kills", rounds * at_once),
            Figure("slowest answer, s", max(stage.ledger.latencies())),
        ]


def is_stopped(member: Member) -> bool:
    """Whether the process is frozen."""
    return bool(psutil.Process(member.pid).status() == psutil.STATUS_STOPPED)


def sigkill_at_random(folder: Path, *, kills: int, ids: int) -> list[Figure]:
    """Workers are killed at random instants of a request's path, and now and then while they start."""
    rng = random.Random(3)
    with Stage(folder, fleet=SWIFT) as stage:
        stage.crew.start(min(kills, 6))
        stage.crew.respawning = True
        with stage.load(rate=150) as load:
            for _ in range(kills):
                at_work = eventually(lambda: a_worker_at_work(stage, rng), 60, "a worker at work")
                victim = at_work if rng.random() < 0.9 else rng.choice(stage.crew.running())
                time.sleep(rng.uniform(0, 0.1))
                stage.crew.kill([victim])
            load.wait_for(ids)
        stage.drain(60)
        return [
            *stage.verdict(),
            Figure("kills", kills),
            Figure("requests that were run again", repeated(stage.ledger.runs())),
        ]


def a_worker_at_work(stage: Stage, rng: random.Random) -> Member | None:
    """A worker that has run something already."""
    seen = {run.pid for run in stage.ledger.executions()[-2000:]}
    return rng.choice([member for member in stage.crew.running() if member.pid in seen] or [None])


def sigkill_around_the_hop(folder: Path, *, kills: int, ids: int) -> list[Figure]:
    """Workers are killed while their requests go on to the next engine: each goes on once, and is answered once."""
    rng = random.Random(8)
    with Stage(folder, fleet=SWIFT) as stage:
        stage.crew.start(2, "pytorch")
        stage.crew.start(4, "fake")
        stage.crew.respawning = True
        for _ in range(kills):
            seen = len(stage.ledger.executions())
            stage.submit(stage.requests(-(-ids // kills), "!hop"))
            pid = eventually(lambda seen=seen: first_on_fake(stage, seen), 30, "a request on the fake engine")
            time.sleep(rng.uniform(0, 0.04))
            stage.crew.kill(member for member in stage.crew.running() if member.pid == pid)
        stage.drain(60)
        hops, answers = stage.ledger.hops, stage.ledger.runs("pytorch")
        return [
            *stage.verdict(),
            Figure("kills", kills),
            Figure("requests that were run again before the hop", repeated(stage.ledger.runs("fake"))),
            Figure("requests that went on twice", repeated(hops), at_most=0),
            Figure("requests that the next engine ran twice", repeated(answers), at_most=0),
        ]


def first_on_fake(stage: Stage, seen: int) -> int | None:
    """The process that was the first to run something on the fake engine after the executions seen."""
    return next((run.pid for run in stage.ledger.executions()[seen:] if run.engine == "fake"), None)


def request_that_kills(folder: Path, *, ids: int, lease: float = 30.0, p99: float = 1.0) -> list[Figure]:
    """A request that kills whoever runs it is given up after three workers, and the others hardly notice."""
    with Stage(folder, fleet={"lease_seconds": lease}) as stage:
        stage.crew.start(4)
        stage.crew.respawning = True
        with stage.load(rate=20) as load:
            load.wait_for(ids // 4)
            before = list(load.ids)
            sent = time.time()
            (killer,) = stage.submit(stage.requests(1, "!die"))
            eventually(lambda: stage.ledger.ended_at(killer), 200, "the end of the request that kills")
            load.wait_for(ids)
        stage.drain(lease + 30)
        during = [one for one in load.ids if one not in set(before)]
        return [
            *stage.verdict(),
            Figure("workers hit", stage.ledger.runs()[killer], at_most=3),
            Figure("dead-lettered after, s", (stage.ledger.ended_at(killer) or float("inf")) - sent, at_most=180),
            Figure("p99 of the others before it, s", percentile(stage.ledger.latencies(before), 0.99)),
            Figure("p99 of the others from then on, s", percentile(stage.ledger.latencies(during), 0.99), at_most=p99),
        ]
