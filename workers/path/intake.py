"""The requests of one engine's queue: claim -> batch -> run -> settle.

Everything here happens on the worker's event loop, except :meth:`Intake.report`, which the engine's thread calls. The
loop never waits for the engine. The picture of it all is ``docs/life-of-a-request.md``.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from vine import promise

from shared.contract import EngineName
from shared.limits import LimitsInForce
from shared.registry import WorkerInfo
from shared.settings import Settings
from workers.broker.delivery import Claim, Delivery
from workers.broker.errors import BROKER_ERRORS
from workers.broker.leases import Leases
from workers.ends.outbox import Outbox
from workers.ends.settler import Settler
from workers.observe.observers import Observers
from workers.path.admission import Admission
from workers.path.conclusion import Conclusion, Pause
from workers.path.execution import Execution, Loop
from workers.path.expiry import Expiry
from workers.path.run_limits import RunLimits
from workers.path.runner import BatchDone, EngineRunner, Event, Finished, ModelsChanged, TokensMade
from workers.path.waiting_room import WaitingRoom
from workers.requests.ending import Ending
from workers.requests.inflight import InFlight, State
from workers.requests.table import RequestTable
from workers.routing.fallback import Fallback

logger = logging.getLogger(__name__)

_UNTIL_IT_IS_BACK = suppress(*BROKER_ERRORS)


@dataclass(frozen=True, slots=True)
class IntakeContext:
    """What all intakes of a worker share.

    ``revoked`` holds the ids that an operator has revoked on this worker; ``clock`` tells seconds since the epoch.
    """

    settings: Settings
    limits: LimitsInForce
    delivery: Delivery
    leases: Leases
    observers: Observers
    settler: Settler
    worker_id: str
    live_workers: Callable[[], list[WorkerInfo]]
    refresh: Callable[[float], None]
    announce: Callable[[], None]
    revoked: Collection[str]
    clock: Callable[[], float]
    run_limits: RunLimits


class Intake:
    """Takes an engine's messages from claim to end."""

    def __init__(self, queue: str, runner: EngineRunner, context: IntakeContext) -> None:
        self.queue = queue
        self.engine: EngineName = runner.models.engine.name
        self.accepting = True
        self.hung = False
        """Whether the engine hangs: what it runs is left to its lease, which counts as a delivery when it lapses."""
        self.table = RequestTable()
        self._runner = runner
        self._context = context
        self._outbox = Outbox(context.settler, self.table)
        self._waiting = waiting = WaitingRoom(runner.models.engine, context.limits)
        fallback = Fallback(
            self.engine, runner.models, context.settings, context.worker_id, context.live_workers, context.refresh,
            context.clock,
        )  # fmt: skip
        self._expiry = Expiry(runner.models, waiting, context.revoked, context.worker_id, fallback.another)
        self._admission = Admission(
            self.table, context.delivery, context.leases, self._outbox, context.observers, runner.models, waiting,
            self._expiry, fallback, context.limits, self._wait,
        )  # fmt: skip
        self._execution = Execution(
            self.table, waiting, runner, self._outbox, context.observers, self._expiry, context.clock, self._has_peer
        )
        self._conclusion = Conclusion(fallback, waiting, context.limits, context.worker_id, context.clock)
        self._reports: deque[Finished | TokensMade | ModelsChanged] = deque()
        self._done: deque[BatchDone] = deque()
        self._loop: Loop | None = None
        self._drain_soon = promise(self.drain)
        self._draining = False

    def attach(self, loop: Loop) -> None:
        """Run on this loop from now on; what is left over from the connection before goes on first."""
        self._loop = loop
        self._execution.attach(loop)
        loop.call_soon(self._drain_soon)

    # -- claim ------------------------------------------------------------------------------------------------------

    def room(self) -> int:
        """How many more requests could start soon: nothing is claimed that another worker could run earlier."""
        return self._execution.room() if self.accepting else 0

    def receive(self, lease: str, envelope: dict[str, Any]) -> None:
        """Take one claimed message over: from here on only its lease counts, whatever becomes of the connection."""
        self._context.leases.hold(lease)
        now = self._context.clock()
        item = InFlight(lease, self.queue, envelope["headers"], envelope["properties"], envelope["body"], now)
        self.table.enter(item)
        with _UNTIL_IT_IS_BACK:  # it stays claimed, and the messages after it are received first
            self._admission.admit(item)

    def claim_delivered(self, claim: Claim) -> None:
        """All messages of a claim were received."""
        self._admit_claimed()
        if claim.cancelled and len(self._waiting):
            self._admission.drop_cancelled(claim.cancelled)
        self._outbox.flush()
        self._execution.claimed()
        self._execution.pump()

    def _admit_claimed(self) -> None:
        """Admit those again during whose admission the broker failed, and ask it about those that others have sent."""
        for item in self.table.all(State.CLAIMED):
            self._admission.admit(item)
        self._admission.ask()

    # -- batch and run ----------------------------------------------------------------------------------------------

    def _wait(self, item: InFlight, now: float) -> None:
        """The last try of what may be what its workers died of is made alone: it takes nobody along."""
        last = 0 < item.deliveries >= self._context.limits.now.max_deliveries - 1
        self._execution.wait(item, now, alone=last)

    def _come_back(self, item: InFlight) -> None:
        """The pause of a request that met a passing error is over."""
        if item.state is State.RESTING:
            self._wait(item, self._context.clock())
            self._execution.pump()

    def _has_peer(self) -> bool:
        """Whether another live worker serves this queue now."""
        me = self._context.worker_id
        return any(
            worker.ready and self.queue in worker.queues for worker in self._context.live_workers() if worker.id != me
        )

    def report(self, event: Event) -> None:
        """The engine's thread says what became of a member or a batch."""
        if isinstance(event, BatchDone):
            self._done.append(event)
        else:
            self._reports.append(event)
        if not self._draining and self._loop is not None:
            self._draining = True
            self._loop.call_soon(self._drain_soon)

    # -- settle -----------------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Start the next batch, and write the ends of what the engine reported."""
        self._draining = False  # what is reported from now on asks for another time
        self._admit_claimed()
        # A free engine first gets its next batch; then the ends of the last one are written.
        self._take_done()
        if self._waiting.begun:  # whether it goes on depends on what came of its last part
            self._take_reports()
        if self._execution.free:
            self._execution.pump()
        self._take_reports()
        self._outbox.flush()
        if self.table.count(State.ALONE):  # it starts when what ran before it is concluded as well
            self._execution.pump()

    def _take_done(self) -> None:
        while self._done:
            done = self._done.popleft()
            self._execution.ended(done.batch, done.seconds)

    def _take_reports(self) -> None:
        while self._reports:
            event = self._reports.popleft()
            if isinstance(event, Finished):
                self._conclude(event)
            elif isinstance(event, ModelsChanged):
                self._context.announce()
            else:
                self._context.observers.tell("tokens_made", self.engine, event.made)

    def _conclude(self, done: Finished) -> None:
        item = done.item
        if item.state is not State.RUNNING or done.part.rows is not item.rows:
            return  # it has ended already, or another worker has it, or it was begun anew
        decision = self._conclusion.of(done, stopping=not self.accepting)
        if decision is None:
            return
        if isinstance(decision, Pause):
            self._execution.rest(item, decision.seconds, self._come_back)
        else:
            self._outbox.add(decision)
        if done.part.rows.left and not done.part.whole:
            self._stop([item])

    # -- what is not wanted any longer --------------------------------------------------------------------------------

    def tend(self) -> None:
        """End what is here and not wanted any longer; where it runs, let the engine know."""
        self._outbox.tell_again()
        held = self.table.all(State.RUNNING, State.WAITING, State.ALONE, State.RESTING)
        if not held:
            return
        gone = self._context.delivery.cancelled_among([item.id for item in held])
        now, ended = self._context.clock(), dict[InFlight, State]()
        for item in held:
            ending = Ending.cancelled(item) if item.id in gone else self._expiry.late(item, now)
            if ending is None and item.state is State.RUNNING:
                ending = self._context.run_limits.exceeded(item)
            if ending is not None:
                ended[item] = item.state
                self._outbox.add(ending)
        self._waiting.remove({item for item, state in ended.items() if state is State.WAITING})
        self._stop([item for item, state in ended.items() if state is State.RUNNING])
        self._outbox.flush()
        if State.ALONE in ended.values():  # others may go on
            self._execution.pump()

    def _stop(self, items: Sequence[InFlight]) -> None:
        """Run no more of what is not wanted, and let the engine know, which knows requests by their ids.

        One that other workers had taken over, and that has come back here, may run under the same id: it is wanted.
        """
        if not items:
            return
        self._waiting.remove(set(items))
        wanted = {other.id for other in self.table.all(State.RUNNING)}
        for item in items:
            if item.id not in wanted:
                self._runner.abort(item)

    def forget(self, leases: Collection[str]) -> None:
        """Drop requests that other workers have taken over: what runs is ended, and nothing is answered."""
        lost = [item for item in self.table if item.lease in leases and item.state is not State.ENDED]
        self._waiting.remove(set(lost))
        ran = [item for item in lost if item.state is State.RUNNING]
        for item in lost:
            self.table.leave(item)
            self._context.observers.tell("lease_lost", item)
        self._stop(ran)

    # -- shutdown ---------------------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Requests claimed and not settled."""
        return len(self.table)

    @property
    def busy(self) -> bool:
        """Whether the engine has not come back with what it was given."""
        return self._execution.busy

    def wind_up(self, hurry: bool) -> bool:
        """Claim no more, return what waits to the queue, and write what has ended; ``True`` when nothing is left here.

        A request that runs in parts goes on until the last of them.
        To be called again and again until it is, or there is no more time: then, to ``hurry``, what runs goes back too.
        """
        self.accepting = False
        self._take_done()
        self._take_reports()
        running = self.table.all(State.RUNNING) if hurry and not self.hung else []
        held = self.table.all(State.CLAIMED, State.ASKING)
        waited = self._waiting.drain()
        self._execution.put_back([*running, *held, *waited, *self.table.all(State.RESTING, State.ALONE)])
        self._stop(running)
        if not self.hung:
            self._execution.finish()
        if running:
            logger.warning("%d requests did not end in time and go back to %s", len(running), self.queue)
        self._outbox.flush()
        self._outbox.tell_again()
        return self.in_flight == (self.table.count(State.RUNNING) if self.hung else 0)
