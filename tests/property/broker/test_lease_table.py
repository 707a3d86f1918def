"""What the process that keeps leases reads while the worker writes."""

from __future__ import annotations

import os
import random
import subprocess
import sys

from hypothesis import given, settings
from hypothesis import strategies as st

from shared.settings import FleetSettings
from tests.support.fleet import ROOT
from workers.broker.lease_table import FIRST_SLOTS, LONGEST_LEASE, SLOT_BYTES, LeaseTable
from workers.broker.leases import LeaseKeeper

LEASES = ("7", "8", "1234567", "1234568", "9@tenant", f"7@{'t' * (LONGEST_LEASE - 2)}")
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("hold"), st.sampled_from(LEASES), st.sampled_from((None, 1.0, 2.0**31, 1e300))),
        st.tuples(st.just("release"), st.sampled_from(LEASES), st.none()),
    )
)


class Table(LeaseKeeper):
    """What a keeper does to its table, without the process."""

    def start(self) -> None:
        """Nothing reads but these tests."""


def contents(table: LeaseTable) -> bytes:
    """The bytes of its first slots: as many as there are leases here."""
    return os.pread(table.descriptor, (1 + len(LEASES)) * SLOT_BYTES, 0)


@settings(deadline=None, max_examples=60)
@given(STEPS, st.randoms(use_true_random=False))
def test_whatever_instant_a_reader_comes_at_it_sees_only_what_was_held(steps, rng: random.Random) -> None:
    """Between two steps it sees what is held; of a step that it sees a part of, what was held before or after it."""
    keeper, reader = Table(FleetSettings(), ""), LeaseTable.create()
    held: dict[str, int] = {}
    try:
        for verb, lease, deadline in steps:
            before, held_before = contents(keeper.table), set(held.items())
            if verb == "hold":
                keeper.hold(lease, deadline)
                held[lease] = 0 if deadline is None else int(min(deadline, 1e11) * 1000)
            else:
                keeper.release([lease])
                held.pop(lease, None)
            after, held_after = contents(keeper.table), set(held.items())

            assert set(keeper.table.read()) == held_after
            assert len(keeper.table.read()) == len(held_after)
            changed = [place for place in range(len(after)) if before[place] != after[place]]
            for share in (0.1, 0.5, 0.9):
                torn = bytearray(before)
                for place in changed:
                    if rng.random() < share:
                        torn[place] = after[place]
                os.pwrite(reader.descriptor, torn, 0)
                assert held_before & held_after <= set(reader.read()) <= held_before | held_after
    finally:
        keeper.close()
        reader.close()


def test_a_table_that_is_full_grows_under_its_reader() -> None:
    """A reader that has the table open sees every lease, and each once."""
    keeper = Table(FleetSettings(), "")
    reader = LeaseTable(os.fdopen(os.dup(keeper.table.descriptor), "r+b", buffering=0))
    leases = [str(number) for number in range(5 * FIRST_SLOTS)]

    for lease in leases:
        keeper.hold(lease)

    assert sorted(reader.read()) == sorted((lease, 0) for lease in leases)
    keeper.release(leases[1:])
    assert reader.read() == [(leases[0], 0)]
    keeper.close()
    reader.close()


READER = """
import os, sys, time
from workers.broker.lease_table import LeaseTable
table = LeaseTable(os.fdopen(int(sys.argv[1]), "r+b", buffering=0))
print("reads", flush=True)
until, reads = time.monotonic() + 0.5, 0
while time.monotonic() < until or not reads:
    for lease, last in table.read():
        number, _, tail = lease.partition("@")
        if last != int(number) * 1000 or tail != "t" * (int(number) % 100):
            sys.exit(f"read {lease!r} until {last}")
        reads += 1
"""


def test_a_process_that_reads_while_another_writes() -> None:
    """No pair of lease and last moment that it reads was not written."""
    keeper = Table(FleetSettings(), "")
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, str(keeper.table.descriptor)], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, pass_fds=[keeper.table.descriptor], text=True,
    )  # fmt: skip
    number = 0

    while reader.poll() is None:
        for _ in range(50):
            lease = f"{number}@{'t' * (number % 100)}"
            keeper.hold(lease, number)
            if number % 3:
                keeper.release([lease])
            number += 1
        keeper.release(list(keeper._slots)[:40])
    keeper.close()

    out, errors = reader.communicate()
    assert (reader.returncode, out.strip(), errors) == (0, "reads", "")
