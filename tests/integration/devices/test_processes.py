"""Real processes that lease the stand-in's GPUs, and are stopped, killed and frozen."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import redis

from shared.embedded import EmbeddedBroker
from shared.gpus import read_gpus
from tests.integration.devices.nvml.standin import StandIn
from tests.support.fleet import ROOT
from tests.support.waiting import eventually

LEASE = 0.8
STARTS = 60
SIZES = (2, 2, 1, 1, 1)


@dataclass
class Forked:
    """A process that is another's child, as far as it can be handled without its parent."""

    pid: int

    def poll(self) -> int | None:
        """``None`` while it is there; its status is not known."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return 0
        return None

    def wait(self, timeout: float = 20) -> int:
        eventually(lambda: self.poll() is not None, timeout, "the process's end")
        return 0

    def send_signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@dataclass
class Holder:
    """A process of ``tests.integration.devices.nvml.holder`` and what it has written."""

    process: subprocess.Popen[bytes] | Forked
    log: Path
    frozen: bool = False

    @property
    def lines(self) -> list[dict[str, Any]]:
        """All complete lines so far."""
        return [json.loads(line) for line in self.log.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def said(self, event: str) -> dict[str, Any] | None:
        """The first line of this event."""
        return next((line for line in self.lines if line["event"] == event), None)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def signal(self, number: int) -> None:
        self.frozen = number == signal.SIGSTOP
        self.process.send_signal(number)


Start = Callable[..., Holder]


@pytest.fixture
def start(broker: EmbeddedBroker, redis_client: redis.Redis, tmp_path: Path) -> Iterator[Start]:
    """Starts holders on an empty broker, forked ones where many are wanted; ends them with the test."""
    made: list[Holder] = []
    forkers: list[subprocess.Popen[str]] = []

    def python(arguments: list[str], environ: dict[str, str], **streams: Any) -> subprocess.Popen[Any]:
        command = [sys.executable, "-m", "tests.integration.devices.nvml.holder", *arguments]
        environ = {**os.environ, **environ, "REDIS_URL": broker.url}
        return subprocess.Popen(command, cwd=ROOT, env=environ, **streams)

    def run(
        standin: StandIn, size: int, *, lease: float = LEASE, wait: float = 30, check: float = 60, forked: bool = False,
        **more: str,
    ) -> Holder:  # fmt: skip
        log = tmp_path / f"holder-{len(made)}.jsonl"
        arguments = [str(value) for value in (size, lease, wait, check)]
        log.touch()
        if forked and not forkers:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            forkers.append(python(["fork"], standin.environ, **pipes))
        if forked:
            forkers[0].stdin.write(json.dumps({"log": str(log), "arguments": arguments}) + "\n")
            forkers[0].stdin.flush()
            process = Forked(int(forkers[0].stdout.readline()))
        else:
            with log.open("wb") as out:
                process = python(arguments, {**standin.environ, **more}, stdout=out)
        made.append(Holder(process, log))
        return made[-1]

    yield run
    for holder in made:
        if holder.alive:
            holder.process.kill()
        holder.process.wait()
    for forker in forkers:
        forker.communicate()


@dataclass(order=True)
class Held:
    """A time in which a process held a GPU for certain."""

    since: float
    until: float
    pid: int = field(compare=False)


def overlaps(holders: list[Holder]) -> tuple[int, list[tuple[Held, Held]]]:
    """How many grants there were, and which of them overlap with another process's.

    A grant counts to the end of its lease, also where the process was killed or frozen meanwhile: the lease stood. Only
    a release ends it earlier.
    """
    by_gpu: dict[str, list[Held]] = {}
    count = 0
    for holder in holders:
        lines = holder.lines
        over = next((line["at"] for line in lines if line["event"] == "releasing"), float("inf"))
        for line in lines:
            if line["event"] == "grant":
                count += 1
                for uuid in line["gpus"]:
                    held = Held(line["since"], min(line["until"], over), line["pid"])
                    by_gpu.setdefault(uuid, []).append(held)
    found = []
    for spans in by_gpu.values():
        spans.sort()
        for at, one in enumerate(spans):
            for other in spans[at + 1 :]:
                if other.since >= one.until:
                    break
                if other.pid != one.pid:
                    found.append((one, other))
    return count, found


# Requirements: 11.3
@pytest.mark.timeout(120)
def test_processes_that_are_stopped_killed_and_frozen_never_share_a_gpu(machine, start, redis_client) -> None:
    """Two tensor-parallel pairs and three singles on four GPUs, tens of starts, and every holding compared."""
    standin: StandIn = machine(4)
    rng = random.Random(7)
    slots: list[Holder | None] = [None] * len(SIZES)
    every: list[Holder] = []
    done = {"term": 0, "kill": 0, "freeze": 0}

    def active(holder: Holder | None) -> bool:
        return holder is not None and holder.alive

    def strike() -> bool:
        """Do something to one process that holds GPUs, or wait until one does."""
        for at, holder in enumerate(slots):
            if not active(holder) and len(every) < STARTS:
                slots[at] = start(standin, SIZES[at], lease=0.5, forked=True)
                every.append(slots[at])
        targets = [holder for holder in slots if active(holder) and (holder.frozen or holder.said("grant"))]
        if not targets:
            return False
        holder = rng.choice(targets)
        if holder.frozen:
            holder.signal(signal.SIGCONT)
        else:
            how = rng.choice(("term", "kill", "freeze"))
            done[how] += 1
            holder.signal({"term": signal.SIGTERM, "kill": signal.SIGKILL, "freeze": signal.SIGSTOP}[how])
            if how != "freeze":
                eventually(lambda: not holder.alive, what="the process's end")
        return True

    while len(every) < STARTS:
        eventually(strike, 30, "a process that holds GPUs")
    for holder in every:
        if holder.alive:
            holder.signal(signal.SIGCONT)
            holder.process.terminate()
    for holder in every:
        holder.process.wait(20)

    count, found = overlaps(every)
    assert found == []
    assert count > STARTS / 2
    assert min(done.values()) >= 5
    assert all(len(set(line["gpus"])) in (1, 2) for holder in every for line in holder.lines if "gpus" in line)
    eventually(lambda: not read_gpus(redis_client).leases, what="the end of all leases")


def test_a_frozen_holder_loses_its_gpu_and_learns_so(machine, start) -> None:
    """Another process has it after the lease's time, not before; the frozen one ends when it thaws."""
    standin: StandIn = machine(1)
    frozen = start(standin, 1)
    eventually(lambda: frozen.said("grant"))
    frozen.signal(signal.SIGSTOP)
    other = start(standin, 1)
    eventually(lambda: other.said("grant"), what="the other's lease")

    frozen.signal(signal.SIGCONT)

    assert frozen.process.wait(20) == 1
    assert "another worker has it" in frozen.said("failed")["reason"]
    assert other.alive
    assert overlaps([frozen, other])[1] == []


# Requirements: 11.4
def test_a_broken_gpu_is_marked_and_the_next_worker_takes_another(machine, start, redis_client) -> None:
    """A GPU is lost while it is held: the holder ends with status 1, and nobody leases that GPU again."""
    standin: StandIn = machine(2)
    first = start(standin, 1, check=0.05)
    (broken,) = eventually(lambda: first.said("held"))["gpus"]

    standin.set(standin.uuids.index(broken), lost=True)

    assert first.process.wait(20) == 1
    (mark,) = read_gpus(redis_client).marks
    assert (mark.uuid, mark.reason) == (broken, "it no longer answers (GPU is lost)")
    standin.set(standin.uuids.index(broken), lost=False)
    second = start(standin, 1)
    assert eventually(lambda: second.said("held"))["gpus"] != [broken]


@pytest.mark.parametrize(("change", "reason"), [({"ecc": 1}, "memory errors rose"), ({"xid": 79}, "Xid 79")])
def test_each_hardware_failure_ends_the_holder(machine, start, change, reason) -> None:
    """Memory errors and driver events, as a lost GPU."""
    standin: StandIn = machine(1)
    holder = start(standin, 1, check=0.05)
    eventually(lambda: holder.said("grant"))
    eventually(lambda: len(holder.lines) > 2, what="a renewal, after the first look at the GPU")

    standin.set(0, **change)

    assert holder.process.wait(20) == 1
    assert reason in holder.said("failed")["reason"]


def test_who_gets_no_gpu_is_told_who_has_them(machine, start) -> None:
    """After the configured wait; a machine that could never do is refused at once."""
    standin: StandIn = machine(1)
    holder = start(standin, 1)
    eventually(lambda: holder.said("grant"))

    waited = start(standin, 1, wait=0.6)
    impossible = start(standin, 2)

    assert (waited.process.wait(20), impossible.process.wait(20)) == (3, 3)
    assert f"held by holder-{holder.process.pid}" in waited.said("refused")["message"]
    assert "needs 2 GPUs" in impossible.said("refused")["message"]


def test_a_worker_sees_only_what_it_leased(machine, start) -> None:
    """The least loaded of those that the operator allows, by number for vLLM."""
    standin: StandIn = machine(4)
    standin.set(1, used_mb=9000)

    holder = start(standin, 1, CUDA_VISIBLE_DEVICES=f"1,{standin.uuids[3]}")

    held = eventually(lambda: holder.said("held"))
    assert (held["gpus"], held["visible"]) == ([standin.uuids[3]], "3")
