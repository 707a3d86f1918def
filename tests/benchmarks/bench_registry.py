"""What the heartbeats of a large fleet cost the broker: its processor time, by its own count.

``python -m tests.benchmarks.bench_registry 200`` announces so many workers on an embedded broker, each with several
models, and has each of them learn who lives, round after round.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import redis

from shared.contract import EngineName, Kind
from shared.embedded import EmbeddedBroker
from shared.registry import EngineInfo, Roster, ServedModel, WorkerInfo, WorkerRegistry
from shared.settings import FleetSettings

ROUNDS = 5


def worker_of(number: int, in_flight: int = 0) -> WorkerInfo:
    """What a worker with four models announces; what is in flight differs each time."""
    model = ServedModel(kinds=tuple(Kind), loaded=True, notes=("attention: sdpa", "precision: float16"))
    return WorkerInfo(
        id=f"host-{number}-abcdef", host=f"host-{number}", pid=number, started=float(number), queues=("pytorch",),
        engines=(EngineInfo(name=EngineName.PYTORCH, models={f"model-{n}": model for n in range(4)}),),
        in_flight=in_flight,
    )  # fmt: skip


class Announcers:
    """So many workers, as far as the registry knows them."""

    def __init__(self, client: redis.Redis, count: int) -> None:
        self._client = client
        self._count = count
        registry = WorkerRegistry(client, 3600.0)
        self._rosters = [Roster(registry) for _ in range(count)]
        self.round(0)

    def round(self, in_flight: int) -> int:
        """Every worker's heartbeat; returns how many workers they know of, together."""
        known = 0
        for number, roster in enumerate(self._rosters):
            known += len(roster.announce(worker_of(number, in_flight)))
        return known

    def micros(self) -> float:
        """The broker's processor time for a heartbeat, in microseconds."""
        before = _processor_seconds(self._client)
        for number in range(1, ROUNDS + 1):
            assert self.round(number) == self._count**2
        return (_processor_seconds(self._client) - before) / (ROUNDS * self._count) * 1e6


def _processor_seconds(client: redis.Redis) -> float:
    info: dict[str, Any] = client.info("cpu")
    return float(info["used_cpu_sys_main_thread"]) + float(info["used_cpu_user_main_thread"])


def main(count: int) -> None:
    """Print it."""
    with tempfile.TemporaryDirectory() as folder, EmbeddedBroker(Path(folder)) as broker:
        announcers = Announcers(redis.Redis.from_url(broker.url, protocol=2), count)
        announcers.round(0)
        micros = announcers.micros()
    share = micros / 1e6 * count / FleetSettings().heartbeat_seconds
    print(f"{count} workers: {micros:.0f} µs a heartbeat, {share:.2%} of the broker's time")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
