"""The broker forgets: its last writes, as a failover to a replica that lagged behind does, or everything."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis

from shared import keys
from shared.embedded import EmbeddedBroker
from tests.faults.proxy import Mode, Proxy
from tests.faults.stage import Figure, Stage, repeated
from tests.support.waiting import eventually

RATE = 60.0

SLOW: dict[str, Any] = {"optimization": {"fake": {"latency_ms": 200}}}
"""So that much is under way when it happens."""

LAG_SECONDS = 0.3
"""For how long the replica has got nothing any more when the master dies."""

MARGIN_SECONDS = 0.5
"""How long it may take until what the broker did is noted here."""


class ReplicatedBroker:
    """A master, a replica, and the address at which clients find the one that is the master now."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._number = 0

    @property
    def url(self) -> str:
        """Where clients find it."""
        return self._proxy.url

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._master = self._start()
            self._proxy = stack.enter_context(Proxy(self._master.port))
            self._replica = self._follow()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._master.stop()
        self._replica.stop()

    def fail_over(self, lag: float, accepted: Callable[[], set[str]]) -> tuple[float, set[str]]:
        """The replica gets nothing any more, and after ``lag`` seconds takes the place of the master, which is killed.

        Returns when the replica stopped to follow (seconds since the epoch), and those of the ``accepted`` ids that it
        does not know of. Nothing is accepted between the two masters, so that what the first one took is noted.
        """
        with redis.Redis(port=self._replica.port) as client:
            client.execute_command("REPLICAOF", "NO", "ONE")
            cut = time.time()
            time.sleep(lag)
            self._proxy.set(Mode.CUT)
            self._master.kill()
            known = {name.decode() for name in client.zrange(keys.UNDER_WAY, 0, -1)}
            prefix = keys.result_key("")
            known |= {name.decode().removeprefix(prefix) for name in client.scan_iter(f"{prefix}*", 1000)}
        time.sleep(MARGIN_SECONDS)
        forgotten = accepted() - known
        self._master = self._replica
        self._proxy.target = self._master.port
        self._proxy.set(Mode.PASS)
        self._replica = self._follow()
        return cut, forgotten

    def _start(self) -> EmbeddedBroker:
        self._number += 1
        broker = EmbeddedBroker(self._folder / f"broker-{self._number}", append_only=True)
        broker.start()
        shutil.rmtree(self._folder / f"broker-{self._number - 2}", ignore_errors=True)
        return broker

    def _follow(self) -> EmbeddedBroker:
        replica = self._start()
        with redis.Redis(port=replica.port) as client:
            client.execute_command("REPLICAOF", "127.0.0.1", str(self._master.port))
            info: Any = client.info
            eventually(lambda: info("replication")["master_link_status"] == "up", 30, "the replica's copy")
        return replica


def failover(folder: Path, *, times: int, ids: int, lag: float = LAG_SECONDS) -> list[Figure]:
    """A replica that lacks the last writes takes over under load.

    What it has ends once. What it lacks was accepted in vain: submitted again under the same ids, it ends as well.
    """
    broker = ReplicatedBroker(folder)
    forgotten: set[str] = set()
    windows: list[tuple[float, float]] = []
    with Stage(folder, broker, **SLOW) as stage:
        stage.crew.start(3)
        with stage.load(RATE) as load:
            for number in range(1, times + 1):
                load.wait_for(ids * number // (times + 1))
                cut, lacking = broker.fail_over(lag, lambda: set(stage.ledger.accepted))
                windows.append((cut - MARGIN_SECONDS, time.time() + MARGIN_SECONDS))
                forgotten |= lacking
            load.wait_for(ids)
        stage.drain(60)
        lost = [one for one in stage.ledger.look() if one not in forgotten]
        again = sorted(set(stage.ledger.open()) & forgotten)
        for request_id in again:
            stage.submit([{"id": request_id, "model": "echo", "inputs": {"prompt": request_id.removeprefix("r")}}])
        stage.drain(60)
        verdict = stage.ledger.verdict()
        return [
            Figure("ids", verdict.accepted),
            Figure("lost of what the new master had", len(lost), at_most=0),
            Figure("what it lacked, submitted again", len(again)),
            Figure("lost after that", len(verdict.lost), at_most=0),
            Figure("doubled", len(ended_twice(stage, windows)), at_most=0),
            Figure("unexpected", len(verdict.unexpected), at_most=0),
            Figure("leases left", stage.redis.zcard(keys.LEASE_INDEX), at_most=0),
            Figure("requests run twice", repeated(stage.ledger.runs())),
        ]


def ended_twice(stage: Stage, windows: Sequence[tuple[float, float]]) -> list[str]:
    """The ids with more than one end, but for those whose first one the new master did not get."""
    return [
        one
        for one in stage.ledger.verdict().doubled
        if not any(first <= stage.ledger.records[one][0].at <= last for first, last in windows)
    ]


def flushed(folder: Path, *, times: int, ids: int) -> list[Figure]:
    """Somebody empties the broker under load: what is accepted after it is answered, by the same workers."""
    flushes: list[float] = []
    with Stage(folder, **SLOW) as stage:
        members = stage.crew.start(3)
        with stage.load(RATE) as load:
            for number in range(1, times + 1):
                load.wait_for(ids * number // (times + 1))
                stage.redis.flushall()
                flushes.append(time.time())
            load.wait_for(ids)
        stage.drain(20)
        gone = set(stage.ledger.look())
        new = [one for one in gone if max(flushes) < stage.ledger.accepted[one] - MARGIN_SECONDS]
        verdict = stage.ledger.verdict()
        return [
            Figure("ids", verdict.accepted),
            Figure("gone with what the broker held", len(gone)),
            Figure("lost of those accepted since", len(new), at_most=0),
            Figure("unexpected", len(verdict.unexpected), at_most=0),
            Figure("workers that ended", sum(not member.alive() for member in members), at_most=0),
            Figure("leases left", stage.redis.zcard(keys.LEASE_INDEX), at_most=0),
        ]
