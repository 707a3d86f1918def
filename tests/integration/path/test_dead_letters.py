"""``muai dead``: what was given up can be looked at without its inputs, tried again, and forgotten."""

from __future__ import annotations

import json

import pytest

from shared import keys
from shared.errors import DeadLettered
from tests.support.fleet import FleetUnderTest
from tests.support.shell import muai_says
from tests.support.waiting import eventually

PRIVATE = "what nobody else should read"


def give_up(fleet: FleetUnderTest, request_id: str) -> None:
    """Let a request's worker die again and again."""
    handle = fleet.client.submit(id=request_id, model="echo", inputs={"prompt": PRIVATE}, timeout=100)
    while not handle.done():
        process = fleet.start_worker()
        eventually(lambda: any(w.in_flight for w in fleet.client.fleet()) or handle.done(), what="the request's start")
        process.kill()
        process.wait()
        if fleet.client.recover(request_id) is not None:
            break
    with pytest.raises(DeadLettered):
        handle.result(20)


def test_dead_letters_can_be_shown_replayed_and_dropped(make_fleet, redis_client) -> None:
    """A request that was given up is listed with its reason; replayed, it gets a right answer under the same id."""
    slow = {"fleet": {"lease_seconds": 0.6, "sweep_seconds": 0.2, "heartbeat_seconds": 0.2, "max_deliveries": 2}}
    fleet = make_fleet(**slow, optimization={"fake": {"latency_ms": 3000}})
    give_up(fleet, "poor")
    redis_client.lpush("fake", b"not a message")
    quick = make_fleet(**slow)
    quick.start_worker()
    eventually(lambda: redis_client.xlen(keys.DEAD_LETTERS) == 2, what="the second dead letter")

    table = muai_says(quick, "dead", "list")
    (letter,) = [
        json.loads(line) for line in muai_says(quick, "dead", "list", "--json", "--reason", "delivered").splitlines()
    ]

    assert "delivered 2 times" in table
    assert PRIVATE not in table
    assert letter["request"] == "poor"
    assert letter["queue"] == "fake"
    assert PRIVATE not in muai_says(quick, "dead", "show", "poor")
    assert PRIVATE in muai_says(quick, "dead", "show", letter["id"], "--inputs")
    assert "no dead letter nobody" in muai_says(quick, "dead", "replay", "nobody", status=2)
    assert "--all or --reason" in muai_says(quick, "dead", "drop", status=2)

    assert muai_says(quick, "dead", "replay", "poor").strip() == "1 put back"
    assert quick.client.handle("poor").result(20).text == PRIVATE[::-1]
    assert muai_says(quick, "dead", "drop", "--all").strip() == "1 dropped"
    assert "no dead letters" in muai_says(quick, "dead", "list")
