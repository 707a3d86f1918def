"""Draws compositions: one seed, one composition, on any machine."""

from __future__ import annotations

import random
from dataclasses import replace

from tests.faults.anything.composition import (
    ALPHABETS,
    CELERY,
    ODD,
    ODD_IDS,
    OURS,
    Ask,
    Caller,
    Composition,
    Fault,
    Worker,
)

STYLES = {"calm": 22, "orderly": 12, "workers": 26, "network": 14, "broker": 14, "lossy": 12, "clocks": 8}
"""What sort of trouble there is, and how often."""

CANVASES = ("chain", "group", "chord", "chord body")
MAPS = ("map", "async map", "batch")
WORDS = ("!fail", "!bad", "!crash", "!busy once", "!busy", "!hop", "!sleep 0.3", "!quote")
PLAIN = ("!fail", "!bad", "!crash", "!quote", "!sleep 0.3")
"""Those that mean the same to whoever works on an answer that holds them."""

KINDS = ("generate", "generate", "generate", "chat", "embed", "classify", "rerank", "summarize", "translate")
DEATH = "!die"


def compose(seed: int) -> Composition:
    """The composition of a seed."""
    rng = random.Random(f"anything {seed}")
    style = rng.choices(list(STYLES), weights=list(STYLES.values()))[0]
    if style == "orderly":
        return _orderly(seed, rng)
    tenants = _tenants(rng) if rng.random() < 0.35 else {}
    workers = _workers(rng, style)
    callers = tuple(_caller(rng, number, style, tenants) for number in range(rng.randint(2, 5)))
    stranded = any(caller.queue == "pytorch" for caller in callers)
    made = Composition(
        seed=seed, style=style, rescue_after=1.0 if stranded else 60.0, workers=workers, callers=callers,
        faults=_faults(rng, style, workers), tenants=tenants,
        lease=rng.choice([1.5, 2.0, 3.0]), queue_capacity=rng.choice([100_000, 100_000, 12]),
    )  # fmt: skip
    if style == "workers" and rng.random() < 0.25:
        return _with_deaths(rng, made)
    return _without_engine(rng, made) if style == "workers" and rng.random() < 0.15 else made


def _orderly(seed: int, rng: random.Random) -> Composition:
    """One worker that runs one request at a time, and nothing that breaks: who comes first is served first."""
    worker = Worker(batch=1, latency_ms=rng.choice([2.0, 5.0, 20.0]), queues=rng.choice(["fake", "fake,control"]))
    callers = []
    for number in range(rng.randint(1, 4)):
        how = rng.choice(["client", "asyncio", "map", "celery", "celery"])
        asks = tuple(
            Ask(id=f"c{number}r{index}", priority=rng.choice(["normal", "normal", "high", "low"]))
            for index in range(rng.randint(5, 25))
        )
        countdown = rng.choice([None, 0.8]) if how == "celery" else None
        callers.append(Caller(
            how=how, asks=asks, countdown=countdown, at=rng.choice([0.0, 0.2]), pace=rng.choice([0.0, 0.0, 0.004]),
        ))  # fmt: skip
    return Composition(seed=seed, style="orderly", workers=(worker,), callers=tuple(callers))


def _tenants(rng: random.Random) -> dict[str, dict[str, float]]:
    rules: dict[str, dict[str, float]] = {}
    for name in rng.sample(["acme", "beta", "*"], rng.randint(1, 3)):
        rule: dict[str, float] = {}
        if rng.random() < 0.6:
            rule["in_flight_share"] = rng.choice([0.05, 0.25, 0.5])
        if rng.random() < 0.4:
            rule |= {"requests_per_second": 20.0, "burst": 10}
        if rng.random() < 0.4:
            rule["weight"] = 3.0
        rules[name] = rule
    return rules


def _workers(rng: random.Random, style: str) -> tuple[Worker, ...]:
    latency, item = rng.choice([(0.0, 0.0), (3.0, 1.0), (30.0, 2.0), (80.0, 0.0)])
    batch = rng.choice([1, 2, 4, 8, 32])
    if batch <= 2:
        latency = min(latency, 10.0)
    proxied = style == "network" and rng.choice(["all", "some", "some"])
    found = []
    for number in range(rng.choice([1, 1, 2, 2, 3])):
        queues = rng.choice(["fake", "fake", "fake", "fake,pytorch", "fake,control"])
        found.append(Worker(
            queues=queues, batch=batch, latency_ms=latency, per_item_ms=item,
            load_ms=rng.choice([0, 0, 0, 600]), first_ms=rng.choice([0, 0, 0, 500]),
            proxied=proxied == "all" or (proxied == "some" and number == 0),
        ))  # fmt: skip
    if rng.random() < 0.4:
        found.append(Worker(queues="pytorch", batch=batch, latency_ms=latency, per_item_ms=item))
    if rng.random() < 0.25:
        found.append(replace(found[0], at=round(rng.uniform(0.3, 2.0), 2)))
    return tuple(found)


def _asks(rng: random.Random, number: int, count: int, tenants: dict[str, dict[str, float]]) -> tuple[Ask, ...]:
    troubled, sized = rng.random() < 0.35, rng.random() < 0.3
    priorities = ["normal"] if rng.random() < 0.6 else ["high", "normal", "low"]
    names = ["default", *(name if name != "*" else "other" for name in tenants)]
    tenant = rng.choice(names)
    asks = []
    for index in range(count):
        kind = rng.choice(KINDS)
        word = rng.choice(WORDS) if troubled and rng.random() < 0.25 else ""
        asks.append(Ask(
            id=f"c{number}r{index}", kind="generate" if word else kind, word=word,
            model="only" if rng.random() < 0.1 and (word or kind in ("generate", "chat")) else "echo",
            size=rng.choice([0, 1, 30, 300, 6000]) if sized else 8, alphabet=rng.choice(list(ALPHABETS)),
            texts=rng.choice([1, 1, 2, 5]), priority=rng.choice(priorities), tenant=tenant,
        ))  # fmt: skip
    return tuple(asks)


def _caller(rng: random.Random, number: int, style: str, tenants: dict[str, dict[str, float]]) -> Caller:
    how = rng.choice(("client", *OURS) if rng.random() < 0.6 else ("celery", *CELERY))
    if style == "lossy" and how == "conflict":  # nobody knows then what the id stood for
        how = "again"
    few = how in (*CANVASES, "again", "conflict", "forked", "celery again")
    count = rng.randint(2, 5) if few else rng.choice([1, 3, 10, 25, 60])
    asks = _asks(rng, number, count, {} if how in CELERY else tenants)
    if how in CANVASES:
        asks = tuple(
            replace(ask, kind="generate", size=min(ask.size, 300), texts=1, word=ask.word if ask.word in PLAIN else "")
            for ask in asks
        )
    elif rng.random() < 0.2:
        at = rng.randrange(len(asks))
        faults = [odd for odd in ODD if how != "batch" or odd not in ODD_IDS]  # its lines have no ids of their own
        odd = replace(asks[at], odd=rng.choice(faults), word="", kind="generate")
        asks = (*asks[:at], odd, *asks[at + 1 :])
    made = Caller(
        how=how, at=round(rng.uniform(0, 1.5), 2), asks=asks, pace=rng.choice([0.0, 0.0, 0.01, 0.05]),
        queue=rng.choice(["fake", "fake", "fake", "pytorch"]) if how == "celery" and style == "calm" else "fake",
        window=rng.choice([512, 64, 4, 1]), on_outage=rng.choice(["raise", "raise", "wait", "spool"]),
        proxied=style == "network" and how in ("client", "map", "asyncio", "celery") and rng.random() < 0.4,
    )  # fmt: skip
    if how in ("client", "asyncio", "map", "async map", "batch") and rng.random() < 0.3:
        made = replace(made, timeout=rng.choice([0.4, 1.0, 2.5, 60.0]))
    if how in MAPS and style == "lossy":  # they wait for what is lost
        made = replace(made, timeout=1.0)
    if how == "forked" and style == "clocks":
        made = replace(made, skew=rng.choice(STEPS), timeout=rng.choice([None, 20.0]))
    if how == "celery" and rng.random() < 0.35:
        made = replace(made, countdown=rng.choice([0.3, 1.0, 1.7]), eta=rng.random() < 0.4)
    if how in ("celery", *CANVASES) and rng.random() < 0.2:
        made = replace(made, expires=rng.choice([0.05, 0.5, 30.0]))
    if how in ("client", "asyncio", "celery", *CANVASES) and rng.random() < 0.3:
        cancels = rng.randint(1, max(1, len(asks) // 2))
        made = replace(made, cancels=cancels, cancel_after=rng.choice([0.0, 0.05, 0.4]))
    return made


def _without_engine(rng: random.Random, made: Composition) -> Composition:
    """All workers of the first engine are killed, and nobody replaces them: the next engine serves what is left."""
    fake = replace(made.workers[0], queues="fake", at=0.0)
    workers = (*[fake] * rng.randint(1, 2), replace(fake, queues="pytorch"))
    at = round(rng.uniform(0.2, 1.5), 2)
    callers = tuple(
        replace(caller, asks=tuple(replace(ask, model="echo") for ask in caller.asks)) for caller in made.callers
    )
    faults = tuple(Fault(kind="kill", at=at, worker=place) for place in range(len(workers) - 1))
    return replace(made, workers=workers, faults=faults, callers=callers, respawn=False, rescue_after=1.0)


# --- faults -------------------------------------------------------------------------------------------------------

OF_WORKERS = ("kill", "kill", "kill", "stop", "freeze", "kill keeper", "freeze keeper", "kill both")
OF_NETWORK = ("cut", "delay", "hold", "half-open", "silent")
OF_BROKER = ("broker killed", "broker frozen", "broker full")
STEPS = (3600.0, -3600.0, -10.0, 10.0)
LOSSY = ("flush", "failover")
LOSES_LEASES = frozenset({
    "kill", "freeze", "kill keeper", "freeze keeper", "kill both", "cut", "hold", "half-open", "silent",
    "broker killed", "broker frozen", "flush", "failover",
})  # fmt: skip
"""Faults by which a lease may expire, which counts as a delivery."""


def _faults(rng: random.Random, style: str, workers: tuple[Worker, ...]) -> tuple[Fault, ...]:
    kinds = {"workers": OF_WORKERS, "network": OF_NETWORK, "broker": OF_BROKER, "lossy": LOSSY}.get(style)
    if style == "clocks":
        return tuple(
            Fault(
                kind="clock",
                at=round(rng.uniform(0.1, 1.5), 2),
                amount=rng.choice(STEPS),
                worker=rng.randrange(len(workers)),
            )
            for _ in range(rng.randint(1, 2))
        )
    if kinds is None:
        return ()
    at, found = 0.0, []
    for _ in range(1 if style == "lossy" else rng.randint(1, 3)):
        at = round(at + rng.uniform(0.2, 1.2), 2)
        seconds = rng.choice([0.1, 0.5, 1.2, 2.5])
        found.append(Fault(kind=rng.choice(kinds), at=at, seconds=seconds, worker=rng.randrange(len(workers))))
        at += seconds if style == "broker" else 0.0
    if style in ("lossy", "broker") and rng.random() < 0.3:
        found.append(Fault(kind="kill", at=round(rng.uniform(0.2, 2), 2), worker=rng.randrange(len(workers))))
    return tuple(sorted(found, key=lambda fault: fault.at))


def _with_deaths(rng: random.Random, made: Composition) -> Composition:
    """One of our client's requests kills whoever runs it, and nothing else breaks the workers."""
    places = [place for place, caller in enumerate(made.callers) if caller.how in ("client", "asyncio", "celery")]
    if not places:
        return made
    place = rng.choice(places)
    caller = made.callers[place]
    deadly = replace(caller.asks[-1], word=DEATH, kind="generate", odd="", model="echo")
    callers = list(made.callers)
    callers[place] = replace(caller, asks=(*caller.asks[:-1], deadly), cancels=0, timeout=None, expires=None)
    return replace(made, callers=tuple(callers), faults=(), max_deliveries=2)
