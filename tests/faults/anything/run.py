"""Runs a composition to its end, and says what did not hold."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import redis
from celery import Celery

from shared.errors import FleetError
from tests.faults.anything import callers, checks
from tests.faults.anything.checks import Anomaly
from tests.faults.anything.composition import Composition
from tests.faults.anything.happenings import KEEPER, Happenings
from tests.faults.anything.leftovers import left_behind
from tests.faults.anything.scene import Scene
from tests.faults.anything.truth import Truth
from tests.faults.anything.watch import Watch
from tests.support.events import captured

QUIET = ("calm", "orderly")
"""Styles in which nothing breaks: all that is said can be heard."""

START_SECONDS = 4.0
"""Within which a worker has handlers for its signals."""

LOST_AFTER = 4.0
"""Seconds after which what the broker has lost is not waited for."""

BLUNDER = re.compile(
    r"^(?:\w+\.)*(?:AttributeError|KeyError|TypeError|IndexError|NameError|UnboundLocalError|AssertionError|ValueError)\b.*",
    re.MULTILINE,
)
"""The end of a traceback of an error that no broker and no engine makes."""


def anomalies_of(made: Composition, folder: Path) -> list[Anomaly]:
    """Run it in this folder; what did not hold, of each kind the first few."""
    truth = Truth(made, None, {})  # type: ignore[arg-type]
    last = max(
        [fault.at + fault.seconds for fault in made.faults]
        + [worker.at for worker in made.workers]
        + [one.at + (one.countdown or 0) + one.cancel_after + one.pace * len(one.asks) for one in made.callers]
    )
    return checks.few(list(_run(made, folder, last + truth.work + truth.recovery + 12.0)))


def _run(made: Composition, folder: Path, horizon: float) -> Iterator[Anomaly]:
    with Scene(made, folder, horizon) as scene, ExitStack() as stack:
        happenings = Happenings(scene, made)
        for place, worker in enumerate(made.workers):
            if worker.at == 0:
                happenings.started(place, scene.start_worker(worker, wait=False))
        crew = scene.stage.crew
        crew.wait_live()
        crew.respawning = made.respawn
        watch = stack.enter_context(Watch(scene.stage.broker.url))
        events: list[dict[str, Any]] = []
        if made.style in QUIET:
            app = Celery(broker=scene.stage.broker.url, set_as_current=False)
            events = stack.enter_context(captured(app))
        scene.begin()
        happenings.begin()
        threads = [callers.start(scene, caller) for caller in made.callers]
        happenings.wait()
        unfinished = _wait(scene, happenings, threads)
        _settle(scene, scene.over)
        executions = scene.stage.ledger.executions()
        truth = Truth(
            made, scene.book, scene.stage.ledger.records, Counter(run.id for run in executions),
            tuple(happenings.lost), happenings.healed, watch.lag,
        )  # fmt: skip
        yield from (Anomaly("caller", text) for text in [*scene.book.odd, *happenings.odd])
        yield from (Anomaly("caller", f"{name} does not come to its end") for name in unfinished)
        yield from checks.of_requests(truth)
        yield from checks.of_refusals(truth)
        yield from checks.of_order(truth, executions)
        yield from checks.of_limits(truth, executions, watch.most_in_flight)
        yield from (Anomaly("left behind", line) for line in _left(scene))
        if made.style in QUIET:
            _heard_out(events, len(truth.records))
            yield from checks.of_events(truth, _last_events(events))
        stack.close()
        yield from _workers_end(scene, happenings, truth)


def _wait(scene: Scene, happenings: Happenings, threads: list[threading.Thread]) -> list[str]:
    """Wait for the callers; where the broker has lost something, until all the others have their ends."""
    while any(thread.is_alive() for thread in threads) and scene.patience() > 0:
        time.sleep(0.02)
        if happenings.lost and time.time() > happenings.healed + LOST_AFTER:
            truth = Truth(scene.made, scene.book, scene.stage.ledger.records, lost=tuple(happenings.lost))
            open_ones = [one for one in list(scene.book.entries.values()) if truth.ended(one) is None]
            if all(one.refused or (one.accepted and truth.may_be_lost(one)) for one in open_ones):
                scene.over = time.monotonic()
    return callers.wait_all(threads, time.monotonic() + 8.0 if happenings.lost else scene.over)


def _settle(scene: Scene, until: float) -> None:
    """Wait until each request has ended and the broker is quiet; what has not by then never will."""
    stage, book = scene.stage, scene.book
    ids = [book.record_id(one) for one in book.entries.values() if one.accepted is not None]
    stage.ledger.accept(dict.fromkeys(ids, ""))
    while True:
        with suppress(redis.RedisError, FleetError):
            if not stage.ledger.look() and not stage.leftovers():
                return
        if time.monotonic() > until:
            return
        time.sleep(0.05)


def _left(scene: Scene) -> list[str]:
    """What is left in the broker, once it has had a moment to be done with it."""
    found: list[str] = []
    for _ in range(40):
        found = left_behind(scene.stage.redis)
        if not found:
            break
        time.sleep(0.05)
    return found


def _last_events(events: list[dict[str, Any]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for event in list(events):
        if event["type"] in ("task-succeeded", "task-failed", "task-revoked"):
            found[event["uuid"]].append(event["type"])
    return found


def _heard_out(events: list[dict[str, Any]], ended: int) -> None:
    """Events come a moment after what they tell of."""
    for _ in range(30):
        if len(_last_events(events)) >= ended:
            return
        time.sleep(0.05)


def _workers_end(scene: Scene, happenings: Happenings, truth: Truth) -> Iterator[Anomaly]:
    """Stop all workers: each ends by itself, in time, well, and nothing of it is left."""
    crew = scene.stage.crew
    crew.respawning = False
    began = time.monotonic()
    members = [*crew.members, *crew.replaced]
    crew.stop()
    if (took := time.monotonic() - began) > 4.0 + 2 * truth.patience:
        yield Anomaly("stop", f"the workers took {took:.1f} s to stop")
    for member in members:
        expected = member.pid in happenings.killed or (truth.deaths and member.exit_code == -9)
        if member.exit_code == -signal.SIGTERM and (member.ended or 0.0) - member.started < START_SECONDS:
            continue  # it was still starting, and had no handler yet
        if member.exit_code != 0 and not expected:
            yield Anomaly("exit", f"a worker of {member.queues} ended with {member.exit_code}: {_tail(member.log)}")
    for log in sorted({member.log for member in members}):
        if (blunder := BLUNDER.search(log.read_text(errors="replace"))) is not None:
            yield Anomaly("log", f"{log.name}: {blunder[0][:200]}")
    yield from (Anomaly("process left", line) for line in _processes(scene))


def _tail(log: Path) -> str:
    return " | ".join(log.read_text(errors="replace").splitlines()[-3:])[-300:]


def _processes(scene: Scene) -> list[str]:
    """Processes that the workers have started and that are still there a moment later."""
    config = str(scene.stage.config)
    found: list[str] = []
    for _ in range(60):
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                line = process.cmdline()
                if KEEPER in line and process.environ().get("MUAI_CONFIG") == config:
                    found.append(" ".join(line))
        if not found:
            break
        time.sleep(0.05)
    return found
