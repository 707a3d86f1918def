"""Clocks that are wrong and step: those of producers and of workers, under load; the broker's is right."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

from producer import Client
from shared.settings_loader import load_settings
from tests.faults.anything.clock import CLOCK, be_wrong, set_offset
from tests.faults.stage import Figure, Stage, right_answer
from tests.support.forked import Forked
from tests.support.requests import bare_app
from tests.support.waiting import eventually

STEPS = (3600.0, -3600.0, -10.0, 0.0)
TIMEOUT = 30.0
COUNTDOWN = 2.0


def produce(clock: Path, config: Path, url: str, ids: Path, rate: float, stop: Path) -> None:
    """A process that submits requests with a timeout, and notes those that were accepted, until ``stop`` is there."""
    be_wrong(clock)
    with Client(settings=load_settings(config, {"REDIS_URL": url})) as client, ids.open("a") as accepted:
        number = 0
        while not stop.exists():
            number += 1
            request_id, prompt = f"p{number}", f"from a producer {number}"
            request: dict[str, Any] = {"id": request_id, "model": "echo", "inputs": {"prompt": prompt}}
            if number % 2:
                request["deadline"] = time.time() + TIMEOUT  # by its own clock, a moment before it may step
                timeout = None
            else:
                timeout = TIMEOUT
            client.submit(request, timeout=timeout)
            accepted.write(f"{request_id} {prompt}\n")
            accepted.flush()
            time.sleep(1 / rate)


def clock_steps(folder: Path, *, steps: int, ids: int, every: float = 2.0) -> list[Figure]:
    """A producer's and the workers' clocks step by an hour and by seconds: no request fails, and none runs early."""
    rng = random.Random(11)
    folder.mkdir(parents=True, exist_ok=True)
    clocks = [folder / f"clock-{number}" for number in range(4)]
    for clock in clocks:
        set_offset(clock, 0.0)
    accepted, stop = folder / "produced", folder / "stop"
    accepted.touch()
    with Stage(folder) as stage:
        for clock in clocks[1:]:
            stage.crew.start(1, **{CLOCK: str(clock)})
        producer = Forked(produce, clocks[0], stage.config, stage.broker.url, accepted, 30.0, stop)
        eventually(accepted.read_text, what="the producer's first request")
        app, due = bare_app(stage.broker.url), dict[str, float]()

        def send_later() -> None:
            """Tasks of a sender whose clock is right."""
            for request in stage.requests(3):
                due[request["id"]] = time.time() + COUNTDOWN
                app.send_task(
                    "muai.infer", kwargs={"request": request}, queue="fake", task_id=request["id"], countdown=COUNTDOWN
                )
                stage.ledger.accept({request["id"]: right_answer(request["inputs"]["prompt"])})

        with stage.load(rate=20) as load:
            for number in range(steps):
                set_offset(rng.choice(clocks), STEPS[number % len(STEPS)])
                send_later()
                time.sleep(every)
            load.wait_for(ids)
        stop.touch()
        eventually(lambda: producer.poll() is not None, what="the producer's end")
        produced = dict(line.split(" ", 1) for line in accepted.read_text().splitlines())
        stage.ledger.accept({one: right_answer(prompt) for one, prompt in produced.items()})
        stage.drain(60)
        early = [one for one, at in due.items() if (stage.ledger.ended_at(one) or at) < at]
        return [
            *stage.verdict(),
            Figure("steps", steps),
            Figure("requests of the producer", len(produced), at_least=steps),
            Figure("producer's failure", abs(producer.returncode or 0), at_most=0),
            Figure("run before their time", len(early), at_most=0),
        ]
