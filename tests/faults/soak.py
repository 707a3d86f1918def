"""A long time with a fault every now and then: nothing is lost, and nothing grows."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.faults.crew import Member
from tests.faults.proxy import Mode, Proxy
from tests.faults.stage import Figure, Stage
from tests.support.waiting import eventually

NAMES_ONE = re.compile(r"[0-9a-f]{8}-[0-9a-f-]+|\d+")
"""What of a key's name says which one of its kind it is."""

SETTLED_REQUESTS = 200
"""A worker has grown to its usual size when it has run so many."""


def soak(folder: Path, *, minutes: float, every: float = 30.0, kept: int = 10, memory: float = 3.0) -> list[Figure]:
    """Requests flow for so many minutes, and something breaks every so many seconds.

    Results are ``kept`` for so many seconds: what is in the broker after that is what would grow. Growth is what was
    there at the end over what was there near the start; of a worker that was restarted, over what it had when it was
    settled again. ``memory`` is what the oldest worker's may grow by, in percent.
    """
    rng = random.Random(12)
    fleet = {"lease_seconds": 5.0, "max_deliveries": 1000, "result_expires_seconds": kept}
    with Stage(folder, fleet=fleet) as stage, Proxy(stage.broker.port) as proxy:
        stage.crew.start(2)
        stage.crew.start(2, REDIS_URL=proxy.url)
        stage.crew.respawning = True
        faults = Faults(stage, proxy, rng)
        usual: dict[Member, int] = {}
        with stage.load(rate=50) as load:
            load.wait_for(SETTLED_REQUESTS)
        before, bytes_before = quiet_keys(stage, kept)
        end = time.monotonic() + 60 * minutes
        with stage.load(rate=50):
            while time.monotonic() < end:
                next_fault = time.monotonic() + every
                while time.monotonic() < next_fault:
                    note_settled(stage, usual)
                    time.sleep(1.0)
                faults.commit()
            stage.crew.wait_live()
        stage.drain(60)
        after, bytes_after = quiet_keys(stage, kept)
        lasting = [member for member in stage.crew.running() if member in usual]
        lasting.sort(key=lambda member: member.started)
        growths = [100 * (member.memory() / usual[member] - 1) for member in lasting]
        for member, growth in zip(lasting, growths, strict=True):
            print(f"  worker {member.pid}: {time.time() - member.started:.0f} s old, {growth:+.1f} %", flush=True)
        return [
            *stage.verdict(),
            Figure("faults", faults.committed),
            Figure("keys in the quiet broker near the start", before.total()),
            Figure("growth of keys, %", 100 * grown(before, after) / before.total(), at_most=5),
            Figure("growth of what they hold, bytes", bytes_after - bytes_before),
            Figure("workers measured", len(lasting)),
            Figure("growth of the oldest worker's memory, %", growths[0] if growths else 0.0, at_most=memory),
        ]


class Faults:
    """What breaks. The first worker is not killed, so that one lives from the start to the end."""

    def __init__(self, stage: Stage, proxy: Proxy, rng: random.Random) -> None:
        self.committed = 0
        self._stage = stage
        self._proxy = proxy
        self._rng = rng
        self._spared = stage.crew.running()[0]
        self._kinds: list[Callable[[], None]] = [
            self.kill, self.terminate, self.freeze_worker, self.kill_broker, self.freeze_broker, self.half_open,
            partial(self.disturb, Mode.CUT), partial(self.disturb, Mode.FREEZE), partial(self.disturb, Mode.DELAY),
        ]  # fmt: skip

    def commit(self) -> None:
        """One of them, chosen at random."""
        self._rng.choice(self._kinds)()
        self.committed += 1

    def kill(self) -> None:
        """A worker is killed."""
        self._victim().signal(signal.SIGKILL)

    def terminate(self) -> None:
        """A worker is stopped."""
        self._victim().signal(signal.SIGTERM)

    def freeze_worker(self) -> None:
        """A worker is frozen for longer than its leases last."""
        victim = self._victim()
        victim.signal(signal.SIGSTOP)
        time.sleep(7.0)
        victim.signal(signal.SIGCONT)

    def kill_broker(self) -> None:
        """The broker is killed and comes back."""
        self._stage.kill_broker(down=2.0)

    def freeze_broker(self) -> None:
        """The broker is frozen."""
        os.kill(self._stage.broker.pid, signal.SIGSTOP)
        time.sleep(3.0)
        os.kill(self._stage.broker.pid, signal.SIGCONT)

    def half_open(self) -> None:
        """Half of the workers' connections go silent."""
        self._proxy.set(Mode.HALF_OPEN)

    def disturb(self, mode: Mode) -> None:
        """Half of the workers have trouble with the network for a while."""
        self._proxy.set(mode)
        time.sleep(2.0)
        self._proxy.set(Mode.PASS)

    def _victim(self) -> Member:
        return self._rng.choice([member for member in self._stage.crew.running() if member is not self._spared])


def note_settled(stage: Stage, usual: dict[Member, int]) -> None:
    """Note the memory of workers that have run enough to have their usual size."""
    runs = stage.ledger.runs_by_worker()
    for member in stage.crew.running():
        if member not in usual and runs[member.pid] >= SETTLED_REQUESTS:
            usual[member] = member.memory()


def grown(before: Counter[str], after: Counter[str]) -> int:
    """How many more keys there are of each kind; a first one of its kind is what something is noted in from then on."""
    return sum(max(0, count - max(1, before[kind])) for kind, count in after.items())


def quiet_keys(stage: Stage, kept: int) -> tuple[Counter[str], int]:
    """The keys that the broker holds once nothing is under way and results have expired, by kind, and their bytes.

    Keys are of a kind whose names differ in numbers and ids only.
    """
    held: list[int] = []

    def steady() -> bool:
        held.append(stage.redis.dbsize())
        return len(held) > kept and len(set(held[-5:])) == 1

    eventually(lambda: time.sleep(1.0) or steady(), 60, "a quiet broker")
    names = list(stage.redis.scan_iter())
    kinds = Counter(NAMES_ONE.sub("*", name.decode(errors="replace")) for name in names)
    return kinds, sum(stage.redis.memory_usage(name) or 0 for name in names)
