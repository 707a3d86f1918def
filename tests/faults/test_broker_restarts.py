"""The broker is killed and restarted under load: what it accepted is answered, and nobody needs a hand."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from shared.embedded import EmbeddedBroker
from shared.errors import FleetError
from tests.conftest import eventually

REQUESTS = 4000
CHUNK = 20


@pytest.mark.timeout(170)
def test_a_broker_that_is_killed_under_load_loses_nothing_that_it_kept(tmp_path: Path, make_fleet) -> None:
    """SIGKILL twice with the append-only file on; refused submits are repeated with the same ids; all are answered."""
    with EmbeddedBroker(tmp_path / "own-broker", append_only=True) as own:
        fleet = make_fleet(
            fleet={"lease_seconds": 3, "sweep_seconds": 0.5, "max_deliveries": 20},
            optimization={"fake": {"latency_ms": 3, "per_item_ms": 1}},
        )
        fleet.url = own.url
        workers = [fleet.start_worker() for _ in range(2)]
        done = threading.Event()

        def strike() -> None:
            for down in (0.2, 2.0):
                if done.wait(2.0):
                    return
                own.kill()
                done.wait(down)
                own.start()

        striker = threading.Thread(target=strike)
        striker.start()
        handles = []
        try:
            for first in range(0, REQUESTS, CHUNK):
                chunk = [
                    {"id": f"r{number}", "model": "echo", "inputs": {"prompt": str(number)}}
                    for number in range(first, first + CHUNK)
                ]

                def sent(chunk: list[dict[str, object]] = chunk) -> list[object] | None:
                    try:
                        return fleet.client.submit_many(chunk)
                    except FleetError:
                        return None  # unknown whether it was taken: the same ids again

                handles += eventually(sent, 30, "an accepted submit")
                done.wait(0.02)
            texts = {handle.id: handle.result(30).text for handle in handles}
        finally:
            done.set()
            striker.join()

        assert texts == {f"r{number}": str(number)[::-1] for number in range(REQUESTS)}
        assert [worker.poll() for worker in workers] == [None, None]
        eventually(lambda: sum(fleet.client.queue_lengths().values()) == 0, 15, "empty queues")
        fleet.stop()
