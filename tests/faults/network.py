"""The broker is killed, freezes or is full; connections to it go silent."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from producer import Client
from shared.errors import BrokerUnavailable, FleetError
from tests.faults.proxy import Mode, Proxy
from tests.faults.stage import Figure, Stage, repeated

RATE = 60.0


def broker_killed(folder: Path, *, downs: Sequence[float], ids: int) -> list[Figure]:
    """The broker is killed under load and comes back with its append-only file: every worker is at work soon."""
    figures: list[Figure] = []
    with Stage(folder) as stage:
        members = stage.crew.start(3)
        with stage.load(RATE) as load:
            for down in downs:
                load.wait_for(len(load.ids) + ids // (2 * len(downs)))
                stage.kill_broker(down)
                back = stage.consuming_again(time.time(), members, 60)
                figures.append(Figure(f"consuming again after {down:g} s down, s", back, at_most=10))
            load.wait_for(ids)
        stage.drain(120)
        return [*stage.verdict(), *figures, Figure("requests run twice", repeated(stage.ledger.runs()))]


def half_open(folder: Path, *, ids: int, seconds: float, silent: float, patience: float = 5.0) -> list[Figure]:
    """Connections go silent and nobody is told; first new ones pass, then new ones are silent too until it heals."""
    with Stage(folder, fleet={"socket_timeout_seconds": patience}) as stage, Proxy(stage.broker.port) as proxy:
        members = stage.crew.start(3, REDIS_URL=proxy.url)
        with stage.load(RATE) as load:
            load.wait_for(ids // 4)
            began = time.time()
            proxy.set(Mode.HALF_OPEN)
            back = stage.consuming_again(began, members, 60)
            time.sleep(max(0.0, began + seconds - time.time()))
            proxy.set(Mode.SILENT)
            time.sleep(silent)
            proxy.set(Mode.PASS)
            healed = stage.consuming_again(time.time(), members, 60)
            load.wait_for(ids)
        stage.drain(120)
        return [
            *stage.verdict(),
            Figure("consuming again where new connections pass, s", back, at_most=20),
            Figure(f"consuming again after {silent:g} s in which none passed, s", healed, at_most=20),
            Figure("requests run twice", repeated(stage.ledger.runs())),
        ]


def broker_frozen(folder: Path, *, seconds: float, clients: int, ids: int, patience: float = 5.0) -> list[Figure]:
    """The broker freezes: a submit fails soon, and the same ids again give one answer each."""
    refused: list[float] = []
    with Stage(folder, fleet={"socket_timeout_seconds": patience}) as stage, ThreadPoolExecutor(clients) as pool:
        stage.crew.start(2)
        chunks = [stage.requests(max(1, ids // clients)) for _ in range(clients)]
        senders = [stage.another_client() for _ in chunks]
        for sender in senders[::2]:  # half of them have a connection already
            sender.fleet()
        os.kill(stage.broker.pid, signal.SIGSTOP)
        frozen = time.time()
        refused += pool.map(seconds_until_refused, senders, chunks)
        time.sleep(max(0.0, frozen + seconds - time.time()))
        os.kill(stage.broker.pid, signal.SIGCONT)
        for chunk in chunks:
            stage.submit(chunk)
        stage.drain(60)
        return [
            *stage.verdict(),
            Figure("submits", clients),
            Figure("slowest refusal, s", max(refused), at_most=6),
            Figure("requests run twice", repeated(stage.ledger.runs())),
        ]


def seconds_until_refused(client: Client, requests: Sequence[dict[str, Any]]) -> float:
    """How long it took until it was said that the broker does not take these; infinite where it took them."""
    began = time.time()
    with suppress(BrokerUnavailable):
        client.submit_many(requests)
        return float("inf")
    return time.time() - began


def broker_full(folder: Path, *, seconds: float, ids: int) -> list[Figure]:
    """The broker has no room left: submits are refused at once, and all is normal soon after there is room again."""
    refusals: list[float] = []
    odd: set[str] = set()
    with Stage(folder) as stage:
        members = stage.crew.start(3)
        with stage.load(RATE) as load:
            load.wait_for(ids // 2)
            stage.redis.config_set("maxmemory", 1024 * 1024)
            full = time.time()
            while time.time() < full + seconds:
                began = time.time()
                try:
                    stage.submit_once(stage.requests(1))
                except FleetError:
                    refusals.append(time.time() - began)
                except Exception as error:
                    odd.add(type(error).__name__)
                time.sleep(0.2)
            stage.redis.config_set("maxmemory", 0)
            back = stage.consuming_again(time.time(), members, 60)
            load.wait_for(ids)
        stage.drain(120)
        return [
            *stage.verdict(),
            Figure("refused submits", len(refusals), at_least=seconds),
            Figure("slowest refusal, s", max(refusals, default=float("inf")), at_most=1),
            Figure("errors that are not the fleet's", len(odd), at_most=0),
            Figure("consuming again once there was room, s", back, at_most=30),
            Figure("workers that ended", sum(not member.alive() for member in members), at_most=0),
            Figure("requests run twice", repeated(stage.ledger.runs())),
        ]
