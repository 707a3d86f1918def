"""Where a composition takes place: its stage, the network before its broker, and what callers need of both."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from shared.settings import Settings
from tests.faults.anything.book import Book
from tests.faults.anything.clock import CLOCK, set_offset
from tests.faults.anything.composition import Ask, Caller, Composition, Worker
from tests.faults.crew import Member
from tests.faults.ledger import text_of
from tests.faults.proxy import Proxy
from tests.faults.stage import Stage
from tests.faults.worker import FIRST_MS

GENERATE = ["generate", "chat"]
EVERY_KIND = [*GENERATE, "embed", "classify", "rerank", "summarize", "translate"]
HEARTBEAT = 0.3
SWEEP = 0.2
GRACE = 4.0
LARGEST = 400_000


def settings_of(made: Composition) -> dict[str, Any]:
    """The sections of the configuration that a composition sets."""
    return {
        "fleet": {
            "lease_seconds": made.lease, "sweep_seconds": SWEEP, "heartbeat_seconds": HEARTBEAT,
            "max_deliveries": made.max_deliveries, "rescue_after_seconds": made.rescue_after,
            "queue_capacity": made.queue_capacity, "max_payload_bytes": LARGEST,
            "socket_timeout_seconds": 1.5, "tenants": {name: dict(rule) for name, rule in made.tenants.items()},
        },
        "models": {"catalog": {"echo": {"kinds": EVERY_KIND}, "only": {"kinds": GENERATE}}},
        "monitoring": {"server": {"graceful_shutdown_timeout": GRACE}},
        "optimization": {"batcher": {"max_batch_size": 32}},
    }  # fmt: skip


class Scene:
    """A stage with the composition's settings. Everything ends with its block.

    ``horizon`` is how many seconds after the start nobody waits any more.
    """

    def __init__(self, made: Composition, folder: Path, horizon: float) -> None:
        self.made = made
        self.folder = folder
        self.book = Book()
        self.stage = Stage(folder, **settings_of(made))
        self.began = math.inf
        """When the first workers were there, monotonic; infinite before."""
        self.over = math.inf
        self._horizon = horizon
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self.stage)
            self.proxy = stack.enter_context(Proxy(self.stage.broker.port))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def begin(self) -> None:
        """The first workers are there: callers and faults may begin."""
        self.began = time.monotonic()
        self.over = self.began + self._horizon

    def start_worker(self, worker: Worker, *, wait: bool) -> Member:
        """Start a worker of the composition."""
        environ = {
            "MUAI_OPT_BATCHER_MAX_BATCH_SIZE": str(worker.batch),
            "MUAI_OPT_FAKE_LATENCY_MS": str(worker.latency_ms),
            "MUAI_OPT_FAKE_PER_ITEM_MS": str(worker.per_item_ms),
            "MUAI_OPT_FAKE_LOAD_MS": str(worker.load_ms),
            FIRST_MS: str(worker.first_ms),
        }
        if any(fault.kind == "clock" and self.made.workers[fault.worker] == worker for fault in self.made.faults):
            environ[CLOCK] = str(self.clock_of(worker))
            set_offset(self.clock_of(worker), 0.0)
        if worker.proxied:
            environ["REDIS_URL"] = self.proxy.url
        (member,) = self.stage.crew.start(1, worker.queues, wait=wait, **environ)
        return member

    def clock_of(self, worker: Worker) -> Path:
        """The file by which the clock of a worker goes; of those that are alike, all go wrong."""
        return self.folder / f"clock-{self.made.workers.index(worker)}"

    # -- what callers need ------------------------------------------------------------------------------------------

    def url(self, caller: Caller) -> str:
        """Where the caller finds the broker."""
        return self.proxy.url if caller.proxied else self.stage.broker.url

    def settings(self, caller: Caller) -> Settings:
        """The settings of the caller's clients; each has a spool of its own."""
        settings = self.stage.settings(self.url(caller))
        spool = str(self.folder / f"{caller.asks[0].id}.spool")
        return settings.model_copy(update={"fleet": settings.fleet.model_copy(update={"spool_path": spool})})

    def environ(self, caller: Caller) -> dict[str, str]:
        """The environment of the caller's processes."""
        environ = {**self.stage.environ(), "REDIS_URL": self.url(caller)}
        if caller.skew:
            path = self.folder / f"{caller.asks[0].id}.clock"
            set_offset(path, caller.skew)
            environ[CLOCK] = str(path)
        return environ

    def wait_until(self, at: float) -> None:
        """Sleep until so many seconds after the start."""
        time.sleep(max(0.0, self.began + at - time.monotonic()))

    def patience(self) -> float:
        """Seconds until nobody waits any more."""
        return max(0.0, self.over - time.monotonic())

    @property
    def slice(self) -> float:
        """Seconds to wait for an end at a time: where the broker loses things, not every end comes."""
        return min(1.0, self.patience()) if self.made.style == "lossy" else self.patience()

    def tries(self) -> Iterator[int]:
        """Numbers from 0, until nobody waits any more."""
        number = 0
        while number == 0 or self.patience() > 0:
            yield number
            number += 1

    def read_answers(self, path: Path, asks: Sequence[Ask]) -> None:
        """Note what the answer file of a batch run says."""
        answered = [json.loads(line) for line in path.read_text().splitlines()]
        for answer in answered:
            ask = asks[answer["line"] - 1]
            if ask.odd and "error" in answer:
                self.book.refused(ask, _named(answer["error"]["type"]))
                continue
            self.book.accepted([ask])
            self.book.told(ask.id, _end_in(answer))
        self.book.given_ids |= {asks[answer["line"] - 1].id: answer["id"] for answer in answered}

    def read_told(self, path: Path, asks: Sequence[Ask]) -> None:
        """Note what a process of the caller's says that it was told."""
        by_id = {ask.id: ask for ask in asks}
        lines = path.read_text().splitlines() if path.exists() else []
        for request_id, end, at in map(json.loads, lines):
            if end.startswith("?"):
                self.book.refused(by_id[request_id], _named(end[1:]))
            else:
                self.book.accepted([by_id[request_id]])
                self.book.entries[request_id].told.append((end, at))


def _named(name: str) -> BaseException:
    return type(name, (Exception,), {})()


def _end_in(answer: Mapping[str, Any]) -> str:
    return f"!{answer['error']['type']}" if "error" in answer else text_of(answer["result"]["outputs"])
