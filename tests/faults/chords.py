"""Chords whose members end in every way, while workers are killed, for callers that hold the body's id only."""

from __future__ import annotations

import gc
import random
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
from celery import Celery, chain, chord
from celery.canvas import Signature

from shared import keys
from tests.faults.kills import SWIFT
from tests.faults.ledger import TERMINAL
from tests.faults.stage import Figure, Stage
from tests.support.requests import bare_app
from tests.support.waiting import eventually

MEMBERS = 3
GOOD = ("good", "hops", "good", "good")
BAD = ("fails", "is refused", "is cancelled", "has expired", "is no request")

PROMPTS = {"hops": "!hop it", "fails": "!fail", "is refused": "!bad"}


def ended_chords(folder: Path, *, kills: int, chords: int) -> list[Figure]:
    """The body is called where every member was answered, and fails where one was not; nobody waits for ever."""
    rng = random.Random(3)
    fleet = {**SWIFT, "max_deliveries": 20, "heartbeat_seconds": 0.5}
    with Stage(folder, fleet=fleet, optimization={"fake": {"latency_ms": 20}}) as stage:
        stage.crew.start(3)
        stage.crew.start(1, "pytorch")
        stage.crew.respawning = True
        expected = call_them(stage, chords, kills, rng)
        gc.collect()  # results that nobody waits for tell the broker so, while it is there

        def told() -> dict[str, str]:
            records: Any = stage.redis.mget([keys.result_key(body) for body in expected])
            states = [orjson.loads(record)["status"] if record else "" for record in records]
            return {body: state for body, state in zip(expected, states, strict=True) if state in TERMINAL}

        waits = 0
        try:
            eventually(lambda: len(told()) == len(expected), 90, "the end of every body")
        except AssertionError:
            waits = len(expected) - len(told())
        found = told()
        return [
            Figure("chords", len(expected)),
            Figure("kills", kills),
            Figure("bodies that nobody ends", waits, at_most=0),
            Figure("bodies that ended otherwise", sum(found[one] != expected[one] for one in found), at_most=0),
        ]


def call_them(stage: Stage, chords: int, kills: int, rng: random.Random) -> dict[str, str]:
    """Call the chords, and kill workers meanwhile; returns how each body ought to end. The app ends with the call."""
    app = bare_app(stage.broker.url)
    expected: dict[str, str] = {}
    for number in range(chords):
        expected |= call(app, stage, number, rng)
        if number % max(1, chords // max(1, kills)) == 0:
            stage.crew.kill([rng.choice([one for one in stage.crew.running() if one.queues == "fake"])])
    app.close()
    return expected


def call(app: Celery, stage: Stage, number: int, rng: random.Random) -> dict[str, str]:
    """Call a chord; returns the id of its body, and how that ought to end. Nothing else is kept of it."""
    body = str(uuid.uuid4())
    ways = [rng.choice(GOOD) for _ in range(MEMBERS)]
    if number % 2:
        ways[rng.randrange(MEMBERS)] = rng.choice(BAD)
    members = [member(app, stage, way) for way in ways]
    if number % 3 == 0:
        members[0] = chain(infer(app, "before it"), members[0])
    chord(members)(infer(app, "the body", task_id=body))
    return {body: "FAILURE" if set(ways) & set(BAD) else "SUCCESS"}


def infer(app: Celery, prompt: str, **options: Any) -> Signature:
    """A call of the model."""
    request = {"model": "echo", "inputs": {"prompt": prompt}, "engine_preference": ["fake", "pytorch"]}
    return app.signature("muai.infer", kwargs={"request": request}, queue="fake", immutable=True, **options)


def member(app: Celery, stage: Stage, way: str) -> Signature:
    """A member that ends in this way."""
    call = infer(app, PROMPTS.get(way, "good"), task_id=str(uuid.uuid4()))
    if way == "is cancelled":
        stage.client.cancel(call.options["task_id"])
    if way == "has expired":
        call.set(expires=datetime.now(UTC) - timedelta(hours=1))
    if way == "is no request":
        call.kwargs["request"].pop("model")
    return call
