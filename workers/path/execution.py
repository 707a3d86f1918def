"""From waiting to running: when the engine has room, what is due starts; what need not wait here goes back.

The whole way is in ``docs/life-of-a-request.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Any, Protocol

from workers.ends.outbox import Outbox
from workers.observe.observers import Observers
from workers.path.batcher import Batch
from workers.path.expiry import Expiry
from workers.path.runner import EngineRunner
from workers.path.waiting_room import ALONE, WaitingRoom
from workers.requests.ending import Ending
from workers.requests.inflight import InFlight, State
from workers.requests.rows import Part
from workers.requests.table import RequestTable

PREFETCH_WINDOW = 0.02
"""Seconds before the running batch is expected to end at which the next one is claimed."""

AHEAD_SHARE = 0.25
"""How much more than can run is claimed for an engine that batches by itself, so that no slot waits for the broker."""

CLAIM_SECONDS = 0.02
"""How long the next part of a request waits for the answer to a claim: others have their turn between two parts."""

TOGETHER_SECONDS = 0.005
"""What begins to rest within this time comes back together: the loop fires few timers at a turn."""


class Turn(Enum):
    """Whether others were let in since the last batch started, where only requests that have begun wait here."""

    DUE = auto()
    """They were not yet."""
    OPEN = auto()
    """The loop's next turn claims, where the queue may hold any."""
    CLAIMING = auto()
    """There is room, and it was asked for: a claim is under way."""
    OVER = auto()
    """They were."""


class Loop(Protocol):
    """What is needed of the worker's event loop."""

    def call_soon(self, callback: Any, *args: Any) -> Any:
        """Call back at the loop's next turn. From any thread."""

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any) -> Any:
        """Call back after ``delay`` seconds."""


class Execution:
    """Owns the transitions to ``RUNNING``, to ``RESTING`` and back. Times are in seconds since the epoch."""

    def __init__(
        self,
        table: RequestTable,
        waiting: WaitingRoom,
        runner: EngineRunner,
        outbox: Outbox,
        observers: Observers,
        expiry: Expiry,
        clock: Callable[[], float],
        has_peer: Callable[[], bool],
    ) -> None:
        self._table = table
        self._waiting = waiting
        self._runner = runner
        self._outbox = outbox
        self._observers = observers
        self._expiry = expiry
        self._clock = clock
        self._has_peer = has_peer
        self._batches: dict[Batch[Part], float] = {}
        self._resting: dict[tuple[float, int], list[InFlight]] = {}
        self._ahead = int(AHEAD_SHARE * runner.slots) if runner.continuous else 0
        self._slots = runner.slots + self._ahead
        self._turn = Turn.DUE
        self._loop: Loop | None = None
        self._timer_at = float("inf")

    def attach(self, loop: Loop) -> None:
        """Keep time by this loop from now on."""
        self._loop = loop
        self._timer_at = float("inf")

    @property
    def busy(self) -> bool:
        """Whether the engine has not come back with what it was given."""
        return bool(self._batches)

    @property
    def free(self) -> bool:
        """Whether another batch could start."""
        return len(self._batches) < self._slots

    def room(self) -> int:
        """How many more requests could start soon: nothing is claimed that another worker could run earlier."""
        if not self._runner.loaded.is_set() or self._exclusive():
            return 0
        if self._runner.continuous:
            begun = self._waiting.begun
            free = self._slots - len(self._batches) - len(self._waiting)
            return max(free, max(1, self._ahead) - (len(self._waiting) - begun)) if begun else free
        now = self._clock()
        if not all(self._ends_soon(batch, now) for batch in self._batches):
            return 0
        room = self._waiting.room()
        if room > 0 and self._turn is Turn.OPEN:
            self._turn = Turn.CLAIMING
        return room

    def _exclusive(self) -> bool:
        """Whether a request waits to run by itself, or does."""
        if self._table.count(State.ALONE) or self._waiting.alone:
            return True
        return any(batch.key == ALONE for batch in self._batches)

    def _ends_soon(self, batch: Batch[Part], now: float) -> bool:
        """Whether the batch is about to end, going by its like, and is not overdue."""
        usual = self._waiting.usual_seconds(batch)
        return usual is not None and abs(self._batches[batch] + usual - now) <= PREFETCH_WINDOW

    # -- batch ------------------------------------------------------------------------------------------------------

    def wait(self, item: InFlight, now: float, *, alone: bool) -> None:
        """Let a request wait for its turn; ``alone``: until nothing else is in this worker's hands."""
        if item.request is None:
            raise ValueError("a request waits once it is known")
        if alone and not self._exclusive():
            self._table.move(item, State.ALONE)
            return
        self._table.move(item, State.WAITING)
        self._waiting.add(item, item.request, now)

    def pump(self) -> None:
        """Start what is due, where the engine has room; otherwise come back when something is."""
        now = self._clock()
        if self._exclusive():
            self._let_in_alone(now)
        if self.free and len(self._waiting):
            self._drop_unwanted(now)
            if self._others_first():
                self._outbox.flush()
                return
            while self.free and (batch := self._waiting.next_batch(now)) is not None:
                self._start(batch, now)
            self._outbox.flush()
        due = self._waiting.due_at(now) if self.free else None
        if due is not None and due < self._timer_at and self._loop is not None:
            self._timer_at = due
            self._loop.call_later(max(0.0, due - now), self._on_timer)

    def _drop_unwanted(self, now: float) -> None:
        endings = self._expiry.unwanted_among(self._waiting, now)
        self._waiting.remove({ending.item for ending in endings})
        for ending in endings:
            self._outbox.add(ending)

    def _let_in_alone(self, now: float) -> None:
        """Have the one that runs by itself be due, once nothing else is in this worker's hands.

        What has begun is ended before, part by part.
        """
        self.put_back([*self._waiting.drain(), *self._table.all(State.CLAIMED, State.ASKING, State.RESTING)])
        idle = not self._batches and not self._table.count(State.RUNNING)  # one that has run may come to rest here
        idle = idle and not len(self._waiting)
        if idle:
            for item in self._table.all(State.ALONE):
                if (ending := self._expiry.unwanted(item, now)) is not None:
                    self._outbox.add(ending)
        self._outbox.flush(wait=True)  # before it starts: nothing of what was put back is to be lost with this worker
        if idle:
            for item in self._table.all(State.ALONE):
                if item.request is not None:
                    self._waiting.add(item, item.request, now, alone=True)

    # -- others, between two parts of a request ---------------------------------------------------------------------

    def claimed(self) -> None:
        """A claim has brought what there was."""
        if self._turn is Turn.CLAIMING:
            self._turn = Turn.OVER

    def _others_first(self) -> bool:
        """Whether what has begun waits until the queue was looked at: a batch that ends early is not foreseen."""
        if self._turn is Turn.OVER or self._runner.continuous or self._exclusive() or self._loop is None:
            return False
        if self._waiting.begun < len(self._waiting):
            return False
        if self._turn is Turn.DUE:
            self._turn = Turn.OPEN
            self._loop.call_soon(self._end_turn)
        return True

    def _end_turn(self) -> None:
        """Go on, unless a claim is under way: then with what it brings, or when it takes too long."""
        if self._turn is Turn.CLAIMING and self._loop is not None:
            self._loop.call_later(CLAIM_SECONDS, self._go_on)
        else:
            self._go_on()

    def _go_on(self) -> None:
        if self._turn in (Turn.OPEN, Turn.CLAIMING):
            self._turn = Turn.OVER
            self.pump()

    def finish(self) -> None:
        """Start what is left of the requests that have begun: this worker stops, and nothing else is claimed."""
        now = self._clock()
        while self.free and (batch := self._waiting.next_batch(now)) is not None:
            self._start(batch, now)

    def _on_timer(self) -> None:
        self._timer_at = float("inf")
        self.pump()

    # -- run --------------------------------------------------------------------------------------------------------

    def _start(self, batch: Batch[Part], now: float) -> None:
        self._batches[batch] = now
        self._turn = Turn.DUE
        started = [part.item for part in batch.items if part.item.state is not State.RUNNING]
        for item in started:
            self._table.move(item, State.RUNNING)
            item.started, item.first_token, item.began = now, 0.0, 0.0
        self._runner.submit(batch)
        self._observers.tell("batch_started", self._runner.models.engine.name, started)
        self._waiting.started(batch)
        if self._runner.continuous:
            return
        if not self._ends_soon(batch, now):
            self._give_back_waiting()
        usual = self._waiting.usual_seconds(batch)
        if usual is not None and self._loop is not None:
            # The loop claims when it wakes; it is woken in time for the next batch, and looks again when that is late.
            self._loop.call_later(max(0.0, usual - PREFETCH_WINDOW), self._relieve, batch)
            self._loop.call_later(usual + 1.1 * PREFETCH_WINDOW, self._relieve, batch)

    def _relieve(self, batch: Batch[Part]) -> None:
        """Where the batch takes longer than its like, let others have what was claimed in good hope."""
        if batch in self._batches and not self._ends_soon(batch, self._clock()):
            self._give_back_waiting()
            self._outbox.flush()

    def _give_back_waiting(self) -> None:
        """What must wait for the running batch goes back where another worker of the queue can have it."""
        if len(self._waiting) and self._has_peer():
            self.put_back(self._waiting.drain())

    def put_back(self, items: Sequence[InFlight]) -> None:
        """Return these to the front of the queue, in the order in which they came."""
        for item in items:
            self._outbox.add(Ending.given_back(item))

    def ended(self, batch: Batch[Part], seconds: float) -> None:
        """The engine is through with a batch."""
        del self._batches[batch]
        if batch.key != ALONE:
            self._waiting.ended(batch, seconds)
        self._observers.tell("batch_ended", self._runner.models.engine.name, len(batch.items), seconds)

    def rest(self, item: InFlight, seconds: float, then: Callable[[InFlight], None]) -> None:
        """Let a request that met a passing error rest, and wait again then, with all of its rows."""
        if self._loop is None:
            raise RuntimeError("a request rests on a loop")
        self._table.move(item, State.RESTING)
        item.attempts += 1
        key = seconds, int(self._clock() / TOGETHER_SECONDS)
        if key not in self._resting:
            self._resting[key] = []
            self._loop.call_later(seconds, self._rested, key, then)
        self._resting[key].append(item)

    def _rested(self, key: tuple[float, int], then: Callable[[InFlight], None]) -> None:
        for item in self._resting.pop(key):
            then(item)
