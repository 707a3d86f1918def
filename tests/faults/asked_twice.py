"""The same ids from many callers at once, with another content each, while workers are killed."""

from __future__ import annotations

import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from producer import Client
from shared.errors import FleetError, IdConflict
from tests.faults.kills import SWIFT
from tests.faults.stage import Figure, Stage, repeated

CALLERS = 6
PROMPTS = 3
"""How many contents are asked for under each id."""


def same_ids(folder: Path, *, kills: int, ids: int) -> list[Figure]:
    """Whoever asks for what the id stands for gets its answer, everybody else is told of the conflict."""
    rng = random.Random(2)
    with Stage(folder, fleet=SWIFT, optimization={"fake": {"latency_ms": 20}}) as stage:
        stage.crew.start(3)
        stage.crew.respawning = True
        clients = [stage.another_client() for _ in range(CALLERS)]
        told: dict[str, Counter[str]] = {f"r{number}": Counter() for number in range(ids)}
        lock, left = threading.Lock(), threading.Event()

        def ask(place: int) -> None:
            order = list(told)
            random.Random(place).shuffle(order)
            for request_id in order:
                prompt = f"{request_id} {random.Random(f'{place} {request_id}').randrange(PROMPTS)}"
                answer = answer_to(clients[place], request_id, prompt)
                with lock:
                    told[request_id][answer] += 1

        with ThreadPoolExecutor(CALLERS) as pool:
            asking = [pool.submit(ask, place) for place in range(CALLERS)]
            for _ in range(kills):
                left.wait(rng.uniform(0.1, 0.5))
                stage.crew.kill([rng.choice(stage.crew.running())])
                stage.crew.wait_live()
            for one in asking:
                one.result()
        stage.drain(60)
        answers = {one: [text for text in found if not text.startswith("!")] for one, found in told.items()}
        errors = Counter(text for found in told.values() for text in found if text.startswith("!"))
        wrong = sum(found["wrong"] for found in told.values())
        return [
            Figure("ids", len(told)),
            Figure("callers of each", CALLERS),
            Figure("kills", kills),
            Figure("answers to another content", wrong, at_most=0),
            Figure("ids with more than one answer", sum(len(found) > 1 for found in answers.values()), at_most=0),
            Figure("ids without one", sum(not found for found in answers.values()), at_most=0),
            Figure("conflicts told", errors.pop("!IdConflict", 0), at_least=ids / 2),
            Figure("other errors", errors.total(), at_most=0),
            Figure("leases left", stage.leftovers(), at_most=0),
            Figure("requests run twice", repeated(stage.ledger.runs())),
        ]


def answer_to(client: Client, request_id: str, prompt: str) -> str:
    """The answer, ``wrong`` where it is that of another prompt, or the error's name."""
    try:
        text = client.submit(id=request_id, model="echo", inputs={"prompt": prompt}).result(60).text
    except IdConflict:
        return "!IdConflict"
    except (FleetError, TimeoutError) as error:
        return f"!{type(error).__name__}"
    return text if text == prompt[::-1] else "wrong"
