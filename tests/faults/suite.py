"""The faults by name: what each is at full size, held to every bar, and at the size that runs with the tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults import asked_twice, chords, clocks, failover, kills, members, network, soak, stalls, stops
from tests.faults.anything.seeds import run_seeds
from tests.faults.stage import Figure


@dataclass(frozen=True, slots=True)
class Scenario:
    """A fault, and its two sizes."""

    run: Callable[..., list[Figure]]
    full: dict[str, Any]
    short: dict[str, Any]

    def at_full_size(self, folder: Path) -> list[Figure]:
        """Over at least 1,000 ids."""
        return self.run(folder, **self.full)

    def in_short(self, folder: Path) -> list[Figure]:
        """In a few seconds."""
        return self.run(folder, **self.short)


SLACK = 6.0
"""How many times the seconds of its bars a fault may take in a test, beside which others run."""


def missed(figures: list[Figure]) -> str:
    """Those that do not meet their bars by far, a line each."""
    missing = [figure for figure in figures if not figure.met_within(SLACK)]
    return "\n".join(f"{figure.name}: {figure.value:g}, not {figure.bar}" for figure in missing)


SCENARIOS = {
    "killed-mid-request": Scenario(
        kills.sigkill_mid_request,
        full={"kills": 50, "ids": 1500},
        short={"kills": 3, "ids": 100},
    ),
    "killed-asleep": Scenario(
        kills.sigkill_asleep,
        full={"kills": 50, "at_once": 5, "ids": 1000},
        short={"kills": 2, "at_once": 2, "ids": 40},
    ),
    "killed-at-random": Scenario(
        kills.sigkill_at_random,
        full={"kills": 1000, "ids": 10_000},
        short={"kills": 10, "ids": 500},
    ),
    "killed-around-the-hop": Scenario(
        kills.sigkill_around_the_hop,
        full={"kills": 50, "ids": 1000},
        short={"kills": 3, "ids": 60},
    ),
    "request-that-kills": Scenario(
        kills.request_that_kills,
        full={"ids": 3000},
        short={"ids": 150, "lease": 2.0, "p99": 10.0},
    ),
    "bad-members": Scenario(
        members.bad_members,
        full={"batches": 60, "deadly": 5},
        short={"batches": 2, "deadly": 1, "lease": 2.0},
    ),
    "held-interpreter": Scenario(
        stalls.held_interpreter,
        full={"holds": 50, "seconds": 10.0, "long": 30.0, "ids": 1500},
        short={"holds": 2, "seconds": 7.0, "long": 9.0, "ids": 50},
    ),
    "hanging-engine": Scenario(
        stalls.hanging_engine,
        full={"hangs": 5, "idle": 5.0, "ids": 1000},
        short={"hangs": 1, "idle": 2.0, "ids": 60},
    ),
    "rolling-restart": Scenario(
        stops.rolling_restart,
        full={"workers": 4, "rounds": 3, "ids": 1500},
        short={"workers": 2, "rounds": 1, "ids": 100},
    ),
    "engine-gone": Scenario(
        stops.engine_gone,
        full={"ids": 1200},
        short={"ids": 60, "rescue": 2.0, "lease": 2.0},
    ),
    "broker-killed": Scenario(
        network.broker_killed,
        full={"downs": (3.0, 60.0), "ids": 3000},
        short={"downs": (0.5,), "ids": 200},
    ),
    "half-open": Scenario(
        network.half_open,
        full={"ids": 2000, "seconds": 120.0, "silent": 120.0},
        short={"ids": 100, "seconds": 0.0, "silent": 1.0, "patience": 1.0},
    ),
    "broker-frozen": Scenario(
        network.broker_frozen,
        full={"seconds": 10.0, "clients": 20, "ids": 1000},
        short={"seconds": 2.0, "clients": 4, "ids": 40, "patience": 1.0},
    ),
    "broker-full": Scenario(
        network.broker_full,
        full={"seconds": 10.0, "ids": 2000},
        short={"seconds": 2.0, "ids": 100},
    ),
    "failover": Scenario(
        failover.failover,
        full={"times": 30, "ids": 3000},
        short={"times": 2, "ids": 200},
    ),
    "broker-flushed": Scenario(
        failover.flushed,
        full={"times": 5, "ids": 1500},
        short={"times": 1, "ids": 150},
    ),
    "same-ids": Scenario(
        asked_twice.same_ids,
        full={"kills": 50, "ids": 1500},
        short={"kills": 2, "ids": 60},
    ),
    "ended-chords": Scenario(
        chords.ended_chords,
        full={"kills": 50, "chords": 1000},
        short={"kills": 2, "chords": 30},
    ),
    "anything": Scenario(
        run_seeds,
        full={"seeds": range(100)},
        # of every style but that of the clocks, and none that takes long
        short={"seeds": (10, 21, 715, 17, 89, 100, 109, 34, 130, 16, 45, 108), "shrink": 0.0},
    ),
    "clock-steps": Scenario(
        clocks.clock_steps,
        full={"steps": 20, "ids": 1000},
        short={"steps": 4, "ids": 60, "every": 1.0},
    ),
    "soak": Scenario(
        soak.soak,
        full={"minutes": 30.0},
        short={"minutes": 0.25, "every": 2.0, "kept": 3, "memory": 5.0},  # it is still settling
    ),
}
