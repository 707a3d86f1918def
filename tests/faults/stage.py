"""Where a fault takes place: a durable broker, a configuration, workers, a client, and the ledger of it all."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis
import yaml

from producer import Client
from shared import keys
from shared.embedded import EmbeddedBroker
from shared.errors import FleetError
from shared.settings import Settings
from shared.settings_loader import load_settings
from tests.faults.crew import Crew, Member
from tests.faults.ledger import Ledger
from tests.faults.worker import EXECUTIONS
from tests.support.fleet import FAKE, merged
from tests.support.waiting import eventually

CHUNK = 20
DEFAULTS = {
    "optimization": {
        "engine_preference": ["fake", "pytorch"],
        "fake": {"latency_ms": 3, "per_item_ms": 1},
        "parity": {"enabled": False},
        "breaker": {"failures": 1_000_000},
        "batcher": {"max_batch_size": 16},
    },
    "models": {"catalog": {"echo": {"engines": ["fake", "pytorch"]}, "only": {"path": "fake", "engines": ["fake"]}}},
    "monitoring": {"server": {"graceful_shutdown_timeout": 10}},
}

ERRORS = {"!die": "!DeadLettered", "!crash": "!EngineError"}
"""What ought to become of a prompt that begins with one of these."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A number that a scenario measured, and the bar it is held to: at most, at least, or none."""

    name: str
    value: float
    at_most: float | None = None
    at_least: float | None = None

    @property
    def met(self) -> bool:
        """Whether the bar is met."""
        return self.met_within(1.0)

    def met_within(self, slack: float) -> bool:
        """The same, where so many times the seconds of a bar will do: on a machine that is busy with other things."""
        most = self.at_most
        if most is not None and self.name.endswith(", s"):
            most *= slack
        return (most is None or self.value <= most) and (self.at_least is None or self.value >= self.at_least)

    @property
    def bar(self) -> str:
        """The bar in words."""
        if self.at_most is not None:
            return f"<= {self.at_most:g}"
        return f">= {self.at_least:g}" if self.at_least is not None else ""


class Stage:
    """A fleet of its own on a broker of its own, with an append-only file. Everything ends with its block.

    Args:
        folder: where the broker's data, the logs and the ledger are; made where it is missing.
        broker: the broker, where it is not to be a single one; a context manager with a ``url``.
        changes: sections of the configuration, over those of the suite.
    """

    def __init__(self, folder: Path, broker: Any = None, **changes: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.broker = broker or EmbeddedBroker(folder / "broker", append_only=True)
        self.config = folder / "fleet.yaml"
        self.config.write_text(yaml.safe_dump(merged(merged(FAKE, DEFAULTS), changes)), encoding="utf-8")
        self._stack = ExitStack()
        self._numbers = itertools.count()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self.broker)
            self.client = stack.enter_context(Client(settings=self.settings(self.broker.url)))
            self.redis = stack.enter_context(redis.Redis.from_url(self.broker.url, socket_timeout=20))
            self.ledger = stack.enter_context(Ledger(self.folder, self.broker.url))
            self.crew = stack.enter_context(Crew(self.folder, self.environ(), self.client))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def kill_broker(self, down: float) -> None:
        """SIGKILL of the broker, which is back with its data after so many seconds."""
        self.broker.kill()
        time.sleep(down)
        self.broker.start()
        eventually(self._broker_answers, what="the broker's data")

    def _broker_answers(self) -> bool:
        with suppress(redis.RedisError):
            return bool(self.redis.ping())
        return False

    def settings(self, url: str) -> Settings:
        """The settings of this fleet, with the broker at ``url``."""
        return load_settings(self.config, {"REDIS_URL": url})

    def environ(self) -> dict[str, str]:
        """The environment of this fleet's workers."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MUAI_")}
        return {
            **kept,
            "REDIS_URL": self.broker.url,
            "MUAI_CONFIG": str(self.config),
            EXECUTIONS: str(self.folder / "executions.log"),
        }

    # -- asking -----------------------------------------------------------------------------------------------------

    def requests(self, count: int, prompt: str = "", model: str = "echo") -> list[dict[str, Any]]:
        """So many requests with ids of their own; each asks for the answer that only it ought to get."""
        return [
            {"id": f"r{number}", "model": model, "inputs": {"prompt": f"{prompt} {number}".strip()}}
            for number in itertools.islice(self._numbers, count)
        ]

    def submit(
        self, requests: Sequence[Mapping[str, Any]], expected: str | None = None, timeout: float = 300.0
    ) -> list[str]:
        """Submit until they are accepted, with the same ids again where it is not known whether they were."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                return self.submit_once(requests, expected)
            except (FleetError, redis.RedisError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def submit_once(self, requests: Sequence[Mapping[str, Any]], expected: str | None = None) -> list[str]:
        """Submit and note the ids as accepted. Raises what the client raises where they are not.

        ``expected`` is the answer they ought to get; by default what the fake engine makes of each prompt.
        """
        self.client.submit_many(requests)
        self.ledger.accept({one["id"]: expected or right_answer(one["inputs"]["prompt"]) for one in requests})
        return [one["id"] for one in requests]

    @contextmanager
    def load(self, rate: float) -> Iterator[Load]:
        """Requests flow in while the block lasts, so many a second."""
        load = Load(self, rate)
        load.thread.start()
        try:
            yield load
        finally:
            load.stop()

    def another_client(self) -> Client:
        """A client with connections of its own; closed with the stage."""
        return self._stack.enter_context(Client(settings=self.settings(self.broker.url)))

    # -- watching ---------------------------------------------------------------------------------------------------

    def busy(self, among: Sequence[Member]) -> dict[Member, list[str]]:
        """The members that run requests now, and the requests."""
        open_ids = set(self.ledger.open())
        last = {run.id: run for run in self.ledger.executions()}
        found: dict[Member, list[str]] = {}
        for member in among:
            ids = [run.id for run in last.values() if run.pid == member.pid and run.id in open_ids]
            if ids:
                found[member] = ids
        return found

    def consuming_again(self, since: float, members: Sequence[Member], timeout: float) -> float:
        """Seconds from ``since`` (of the epoch) until each of these members had begun a request accepted after it.

        Needs a load. Infinite where one of them had not within ``timeout`` seconds.
        """
        first: dict[int, float] = {}

        def all_have() -> bool:
            for run in self.ledger.executions():
                if self.ledger.accepted.get(run.id, 0.0) > since:
                    first.setdefault(run.pid, run.began)
            return all(member.pid in first for member in members)

        try:
            eventually(all_have, timeout, "the return of every worker")
        except AssertionError:
            return float("inf")
        return max(first[member.pid] for member in members) - since

    def wait_for(self, request_ids: Sequence[str], timeout: float) -> None:
        """Wait until each of these has a terminal record."""
        eventually(lambda: all(map(self.ledger.ended_at, request_ids)), timeout, "their answers")

    def drain(self, timeout: float = 120.0) -> None:
        """Wait until every accepted id has its answer and the broker holds neither messages nor leases.

        What is still open after that is lost: the verdict says so.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            try:
                if not self.ledger.look() and not self.leftovers():
                    return
            except (redis.RedisError, FleetError):
                pass
            time.sleep(0.2)

    def leftovers(self) -> int:
        """Messages that wait and leases that are held."""
        lengths = self.client.queue_lengths()
        return sum(lengths.values()) - lengths["dead"]

    def verdict(self) -> list[Figure]:
        """What every scenario is held to, once the dust has settled."""
        verdict = self.ledger.verdict()
        for request_id in [*verdict.lost, *verdict.doubled, *verdict.unexpected][:5]:
            print(f"  {request_id}: {self.ledger.records.get(request_id)}", flush=True)
        return [
            Figure("ids", verdict.accepted),
            Figure("lost", len(verdict.lost), at_most=0),
            Figure("doubled", len(verdict.doubled), at_most=0),
            Figure("unexpected", len(verdict.unexpected), at_most=0),
            Figure("leases left", self.redis.zcard(keys.LEASE_INDEX), at_most=0),
        ]


class Load:
    """Submits requests at a steady rate from a thread of its own."""

    def __init__(self, stage: Stage, rate: float) -> None:
        self.ids: list[str] = []
        self._stage = stage
        self._pause = CHUNK / rate
        self._size = CHUNK
        if rate < CHUNK * 2:
            self._size, self._pause = 1, 1 / rate
        self._stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, name="load", daemon=True)

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stopped.is_set():
            self.ids += self._stage.submit(self._stage.requests(self._size))
            due = max(due + self._pause, time.monotonic())
            self._stopped.wait(due - time.monotonic())

    def wait_for(self, count: int, timeout: float = 600.0) -> None:
        """Wait until so many were accepted."""
        eventually(lambda: len(self.ids) >= count, timeout, f"{count} accepted requests")

    def stop(self) -> None:
        """Submit no more."""
        self._stopped.set()
        self.thread.join()


def right_answer(prompt: str) -> str:
    """What a request with this prompt ought to be answered; see :mod:`tests.faults.worker` for the words."""
    return ERRORS.get(prompt.partition(" ")[0], prompt[::-1])


def repeated(counts: Counter[str]) -> int:
    """How many ids were counted more than once."""
    return sum(count > 1 for count in counts.values())


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that ``share`` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
