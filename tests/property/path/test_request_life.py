"""A request's life over random claims, reports, lapses, broker errors and stops: it ends once, and nothing is lost.

Real intakes, settlers, sweepers and rescuers of up to three workers on one broker in memory, with an engine, a loop and
a clock that do what the test says.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from shared.contract import EngineName, Priority
from shared.errors import BadRequest, EngineBusy, EngineDied, EngineError, EngineOutOfMemory
from tests.property.path.life import FAKE, OTHER, Life
from tests.support.memory_worker import LEASE_SECONDS, MemoryWorker
from tests.support.scripted import ANSWER
from workers.broker.errors import BROKER_ERRORS
from workers.broker.memory import Failure
from workers.path.runner import TokensMade

pytestmark = pytest.mark.property

AWAY = ConnectionError("the broker is away")
PICKS = st.integers(0, 5)
OUTCOMES = st.sampled_from([
    ANSWER, ANSWER, ANSWER, EngineBusy(), EngineBusy(), EngineError("broke"), EngineOutOfMemory(), EngineDied(),
    BadRequest("bad"),
])  # fmt: skip
STEPS = ["loop", "claim", "claim", "carry out", "answer", "answer", "tend", "sweep", "rescue", "reconnect", "silent"]
TROUBLE = ["lapse", "lapse", "kill", "kill late", "stop", "stop", "rest", "rest", "join", "tokens"]


class RequestLife(Life):
    """Whatever may happen to requests and their workers."""

    @invariant()
    def all_holds(self) -> None:
        self.check()

    @initialize(engines=st.sampled_from([(FAKE, OTHER), (FAKE,)]), peer=st.booleans())
    def start(self, engines: tuple[EngineName, ...], peer: bool) -> None:
        for _ in range(1 + peer):
            self.fleet.worker(*engines, slots=self.slots)

    # -- callers ----------------------------------------------------------------------------------------------------

    @rule(
        engine=st.sampled_from([FAKE, FAKE, OTHER]),
        priority=st.sampled_from([Priority.NORMAL, Priority.NORMAL, Priority.HIGH]),
        tenant=st.sampled_from(["default", "default", "acme"]),
        seconds=st.sampled_from([None, None, None, 0.5, 8.0, 60.0]),
        deliveries=st.sampled_from([0, 0, 0, 0, 1, 2]),
        count=st.integers(1, 4),
        rows=st.sampled_from([0, 0, 0, 2, 8]),
        turn=st.booleans(),
    )
    def submit(
        self, engine: EngineName, seconds: float | None, count: int, rows: int, turn: bool, **fields: Any
    ) -> None:
        """With a prompt, or with texts: more than a batch has room for."""
        if rows:
            fields |= {"kind": "embed", "inputs": {"texts": ["cat" * row for row in range(1, rows + 1)]}}
        for _ in range(count):
            deadline = None if seconds is None else self.fleet.clock() + seconds
            self.fleet.submit(self.new(), engine, deadline=deadline, **fields)
        if turn:
            self.everybody_turns()

    @rule(
        twin=st.one_of(st.none(), PICKS),
        eta=st.sampled_from([None, None, 3.0]),
        expires=st.sampled_from([None, None, 5.0]),
    )
    def another_sender(self, twin: int | None, eta: float | None, expires: float | None) -> None:
        """It may use an id that is under way or has its answer."""
        request_id = self.new() if twin is None or not self.sent else self.recent(twin)
        if twin is not None:
            self.twins.add(request_id)
        headers = {"eta": self.time(eta), "expires": self.time(expires)}
        self.fleet.submit(request_id, FAKE, ours=False, headers=headers)

    @precondition(lambda self: self.sent)
    @rule(number=PICKS, who=st.one_of(st.none(), st.none(), PICKS))
    def cancel(self, number: int, who: int | None) -> None:
        """A caller cancels, or an operator revokes on one worker."""
        if who is None:
            self.fleet.cancel(self.recent(number))
        elif self.workers:
            self.pick(who).revoked.add(self.recent(number))

    # -- the loop ---------------------------------------------------------------------------------------------------

    @rule()
    def everybody_turns(self) -> None:
        for worker in self.workers:
            if worker.stopping:
                continue
            if not worker.connected:
                worker.connect()
            self.rescue(worker)
            worker.turn()

    @precondition(lambda self: self.workers)
    @rule(who=PICKS, step=st.sampled_from(STEPS))
    def step(self, who: int, step: str) -> None:
        """One thing of what a turn does, so that others come between."""
        worker = self.pick(who)
        if worker.stopping:
            return
        if step in ("reconnect", "silent") or not worker.connected:
            if not worker.connected:
                worker.connect(silent=step == "silent")
            return
        steps: dict[str, Callable[[], object]] = {
            "loop": worker.loop.turn,
            "claim": lambda: [worker.claim(engine) for engine in worker.engines],
            "carry out": worker.delivery.carry_out,
            "answer": worker.delivery.answer,
            "tend": worker.tend,
            "sweep": worker.sweeper.sweep,
            "rescue": lambda: self.rescue(worker),
        }
        worker.do(steps[step])

    def rescue(self, worker: MemoryWorker) -> None:
        """As the heartbeat does."""
        with suppress(*BROKER_ERRORS):
            worker.rescuer.look(self.fleet.clock())

    @rule(
        seconds=st.sampled_from([0.01, 0.03, 0.05, 0.2, 1.0, 3.5, 6.0]),
        stalled=st.sampled_from([None, None, None, 0, 1]),
        turn=st.booleans(),
    )
    def time_passes(self, seconds: float, stalled: int | None, turn: bool) -> None:
        self.fleet.pass_time(seconds, [] if stalled is None else self.workers[stalled : stalled + 1])
        if turn:
            self.everybody_turns()

    # -- the engine -------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.runs())
    @rule(number=PICKS, member=PICKS, outcome=OUTCOMES, whole=st.booleans(), turn=st.booleans())
    def report(self, number: int, member: int, outcome: Any, whole: bool, turn: bool) -> None:
        """Out of order, late, and after an end that the engine was told of as well."""
        worker, engine, run = self.runs()[number % len(self.runs())]
        if whole or not run.unreported or self.slots is not None:
            self.through(worker, engine, run, outcome)
        else:
            self.say(worker, engine, run, member, outcome)
        if turn:
            self.everybody_turns()

    # -- faults -----------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.sent and self.workers)
    @rule(who=PICKS, what=st.sampled_from(["before", "after", "registry", "canvas"]))
    def broker_fails(self, who: int, what: str) -> None:
        """The next command of a worker fails, before or after it was carried out; or what it asks or tells others."""
        worker = self.pick(who)
        if what == "registry":
            worker.refresh_failures.append(AWAY)
        elif what == "canvas":
            worker.canvas.failures.append(AWAY)
        else:
            worker.delivery.failures.append(Failure(AWAY, what == "after"))

    @precondition(lambda self: self.busy or not self.workers)
    @rule(who=PICKS, other=PICKS, what=st.sampled_from(TROUBLE))
    def trouble(self, who: int, other: int, what: str) -> None:
        if what == "join" or not self.workers:
            if len(self.workers) < 3:
                self.fleet.worker(*[(FAKE,), (FAKE, OTHER), (OTHER,)][other % 3], slots=self.slots)
            return
        worker = self.pick(who)
        if what == "lapse":
            self.lapse(worker, self.pick(other))
        elif what.startswith("kill"):
            if "late" in what:  # what it had sent arrives
                worker.delivery.carry_out()
            self.leave(worker)
        elif what == "stop" and not worker.stopping:
            worker.begin_stop()
        elif what == "rest":
            self.rest(worker, worker.engines[other % len(worker.engines)])
        elif what == "tokens":
            for engine, runner in worker.runners.items():
                made = [(item, 1) for run in runner.runs for item in run.unreported]
                worker.intakes[engine].report(TokensMade(made))

    def lapse(self, stalled: MemoryWorker, sweeper: MemoryWorker) -> None:
        """A worker stands still until its leases have lapsed, and they are taken over before it goes on."""
        self.fleet.pass_time(LEASE_SECONDS + 0.5, [stalled])
        if not sweeper.stopping:
            sweeper.do(sweeper.sweeper.sweep)
        stalled.leases.keep()

    @precondition(lambda self: any(worker.stopping for worker in self.workers))
    @rule(hurry=st.sampled_from([False, False, True]), tend=st.booleans())
    def wind_up(self, hurry: bool, tend: bool) -> None:
        """As a worker that stops does again and again."""
        for worker in [worker for worker in self.workers if worker.stopping]:
            through = worker.wind_up(hurry=hurry)
            if tend:
                worker.do(worker.tend)
                worker.connected = True
            if through:
                self.has_nothing(worker)
                self.leave(worker)


class ContinuousLife(RequestLife):
    """The same with engines that batch by themselves."""

    slots = 2


COMMON = {"stateful_step_count": 50, "deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}

TestBatches = RequestLife.TestCase
TestBatches.settings = settings(max_examples=100, **COMMON)
TestSlots = ContinuousLife.TestCase
TestSlots.settings = settings(max_examples=50, **COMMON)
