"""What the property tests of a request's life stand on: workers on a broker in memory, and all that must hold."""

from __future__ import annotations

import re
from collections import Counter
from datetime import UTC, datetime
from typing import Any

import orjson
from hypothesis.stateful import RuleBasedStateMachine

from shared.contract import EngineName
from shared.errors import Cancelled, EngineDied
from tests.support.memory_worker import MODEL, MemoryFleet, MemoryWorker, settings_of
from tests.support.scripted import ANSWER, Run
from workers.broker.memory_broker import STANDS
from workers.path.intake import Intake
from workers.path.runner import Finished
from workers.path.waiting_room import ALONE
from workers.requests.inflight import State

FAKE, OTHER = EngineName.FAKE, EngineName.PYTORCH
MAX_DELIVERIES = 3
RESCUE_SECONDS = 5.0

LIFE = re.compile(r"(received (started )*)?(ended|left|lost) ")
"""What observers are told of a request, in the end. One that is refused or delayed never came, for them."""

ALIVE = re.compile(r"(received (started )*)?")


def _error_of(record: bytes) -> str | None:
    """The type of the error in the record of a failure."""
    told = orjson.loads(record)
    return told["result"]["exc_type"] if told["status"] == "FAILURE" else None


class Life(RuleBasedStateMachine):
    """The workers, the requests that were sent, and what must be true of them. ``slots``: of the engines."""

    slots: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.fleet = MemoryFleet(
            settings_of(
                FAKE, OTHER, max_deliveries=MAX_DELIVERIES, rescue_after_seconds=RESCUE_SECONDS,
                batcher={"max_batch_size": 3, "batch_timeout_ms": 50.0},
            )
        )  # fmt: skip
        self.sent: set[str] = set()
        self.twins: set[str] = set()
        self.numbers = 0
        self.gone: list[MemoryWorker] = []

    @property
    def workers(self) -> list[MemoryWorker]:
        return self.fleet.workers

    def pick(self, number: int) -> MemoryWorker:
        return self.workers[number % len(self.workers)]

    def runs(self) -> list[tuple[MemoryWorker, EngineName, Run]]:
        """What the engines have in hands."""
        return [
            (worker, engine, run)
            for worker in self.workers
            for engine, runner in worker.runners.items()
            for run in runner.runs
        ]

    @property
    def busy(self) -> bool:
        """Whether any worker has a request."""
        return any(worker.in_flight for worker in self.workers)

    def new(self) -> str:
        """The id of another request."""
        self.numbers += 1
        request_id = f"r{self.numbers}"
        self.sent.add(request_id)
        return request_id

    def recent(self, number: int) -> str:
        """One of the last ids."""
        return f"r{max(1, self.numbers - number)}"

    def time(self, seconds: float | None) -> str | None:
        """A time from now, as Celery's headers have it."""
        return None if seconds is None else datetime.fromtimestamp(self.fleet.clock() + seconds, UTC).isoformat()

    def say(self, worker: MemoryWorker, engine: EngineName, run: Run, place: int, outcome: Any) -> None:
        """The engine reports a member; what it was told to abort ends as cancelled."""
        part = run.unreported[place % len(run.unreported)]
        worker.runners[engine].finish(run, part, Cancelled() if part in run.aborted else outcome)

    def through(self, worker: MemoryWorker, engine: EngineName, run: Run, outcome: Any) -> None:
        """The engine reports what it has not reported of a batch, and the batch's end."""
        while run.unreported:
            self.say(worker, engine, run, 0, outcome)
        worker.runners[engine].end(run, max(0.001, self.fleet.clock() - run.batch.items[0].item.started))

    def leave(self, worker: MemoryWorker) -> None:
        """A worker is gone."""
        worker.leave()
        self.gone.append(worker)

    def rest(self, worker: MemoryWorker, engine: EngineName) -> None:
        """The model rests on an engine of the worker, or is back."""
        models = worker.runners[engine].models
        if models.failures():
            models.revive()
            models.succeeded(MODEL)
        else:
            models.failed(MODEL, EngineDied())

    # -- what holds at every moment ---------------------------------------------------------------------------------

    def check(self) -> None:
        self.nothing_is_lost()
        self.each_ends_once()
        self.everything_is_in_one_place()
        self.observers_are_told_once_in_order()
        self.one_that_runs_alone_has_no_company()
        self.canvases_are_told_once()

    def copies(self) -> Counter[str]:
        """How many messages of each request are on lists, leased or delayed."""
        broker = self.fleet.broker
        messages = [message for found in broker.queues.waiting().values() for message in found]
        messages += [lease.message for lease in broker.leases.values()]
        return Counter(orjson.loads(message)["headers"]["id"] for message in messages)

    def nothing_is_lost(self) -> None:
        """What has no answer yet is waiting, leased or delayed, in one place only; what has its answer is nowhere.

        One that was cancelled has its answer, and is still to be ended by whoever has it.
        """
        copies = self.copies()
        for request_id in self.sent:
            status = self.fleet.status(request_id)
            assert copies[request_id] or status in STANDS, request_id
            if request_id not in self.twins:
                assert copies[request_id] <= (status not in ("SUCCESS", "FAILURE")), request_id

    def each_ends_once(self) -> None:
        """A terminal record is written once, and nothing is published after it."""
        ended: set[str] = set()
        for key, record in self.fleet.broker.published:
            assert key not in ended, key
            if orjson.loads(record)["status"] in STANDS:
                ended.add(key)
                assert _error_of(record) != "Cancelled", f"{key} failed as cancelled, and nobody has"

    def everything_is_in_one_place(self) -> None:
        for worker in self.workers:
            held = [item for intake in worker.intakes.values() for item in intake.table]
            assert len({item.lease for item in held}) == len(held)
            assert {item.lease for item in held} >= worker.leases.held.keys()
            assert {item.lease for item in held if item.state is not State.ENDED} <= worker.leases.held.keys()
            for engine, intake in worker.intakes.items():
                self._consistent(worker, engine, intake)

    def _consistent(self, worker: MemoryWorker, engine: EngineName, intake: Intake) -> None:
        table, runner = intake.table, worker.runners[engine]
        waiting = set(intake._waiting)
        assert {item for item in waiting if item.state is State.WAITING} == set(table.all(State.WAITING))
        assert {item.state for item in waiting} <= {State.WAITING, State.RUNNING}
        assert all(item.state is state for state in State for item in table.all(state))
        members = {part.item for run in runner.runs for part in run.unreported}
        reported = {event.item for event in intake._reports if isinstance(event, Finished)}
        assert set(table.all(State.RUNNING)) <= members | reported | waiting
        assert len(runner.runs) + len(intake._done) == len(intake._execution._batches)
        assert len(intake._execution._batches) <= intake._execution._slots
        assert {ending.item for ending in intake._outbox._decided} <= set(table.all(State.ENDED))
        assert intake.in_flight == sum(table.count(state) for state in State)

    def observers_are_told_once_in_order(self) -> None:
        for worker in [*self.workers, *self.gone]:
            assert not worker.observers.failures
            held = {item for intake in worker.intakes.values() for item in intake.table}
            for item, steps in worker.witness.steps.items():
                told = "".join(f"{step} " for step in steps)
                assert (ALIVE if item in held else LIFE).fullmatch(told) or worker in self.gone, (item.id, told)
                assert Counter(steps)["started"] <= item.attempts + 1

    def one_that_runs_alone_has_no_company(self) -> None:
        """When what may kill its worker is started, nothing else is in this worker's engine's hands."""
        for worker in self.workers:
            for intake in worker.intakes.values():
                alone = [batch for batch in intake._execution._batches if batch.key == ALONE]
                if alone:
                    assert len(intake._execution._batches) == len(alone)
                    (one,) = {part.item for batch in alone for part in batch.items}
                    others = set(intake.table) - {one}
                    assert all(item.state in (State.ENDED, State.CLAIMED, State.ASKING) for item in others)

    def canvases_are_told_once(self) -> None:
        for worker in [*self.workers, *self.gone]:
            told = Counter(id(ending) for ending in worker.canvas.told)
            assert all(count == 1 for count in told.values())
            items = Counter(ending.item for ending in worker.canvas.told)
            assert all(count == 1 for count in items.values())

    def has_nothing(self, worker: MemoryWorker) -> None:
        assert worker.in_flight == 0
        assert not worker.leases.held
        assert not worker.delivery.under_way

    # -- the end ----------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        """Everything is let run out: then each request has its answer, and nothing is anywhere."""
        if not self.fleet.started:
            return
        for worker in self.workers:
            for failures in (worker.delivery.failures, worker.canvas.failures, worker.refresh_failures):
                failures.clear()
        self.fleet.worker(FAKE, OTHER, slots=self.slots)
        for _ in range(200):
            if not self._round():
                break
        else:
            raise AssertionError(f"it does not come to an end: {self.copies()}")
        broker = self.fleet.broker
        for worker in self.workers:
            assert not worker.stopping
            self.has_nothing(worker)
            assert worker.witness.batches["started"] == worker.witness.batches["ended"]
        assert not broker.queues.waiting()
        assert not broker.leases
        assert not any(broker.queues.in_flight.values())
        for request_id in self.sent:
            assert self.fleet.status(request_id) in STANDS, request_id
            answers = self.fleet.answers(request_id)
            assert answers == 1 or (answers > 1 and request_id in self.twins), (request_id, answers)
        self.check()

    def _round(self) -> bool:
        """Everybody does all there is to do; whether anything is left."""
        for worker in list(self.workers):
            for engine in worker.engines:
                for run in list(worker.runners[engine].runs):
                    self.through(worker, engine, run, ANSWER)
            if worker.stopping:
                worker.connected = True
                worker.do(worker.tend)
                if worker.wind_up():
                    self.has_nothing(worker)
                    self.leave(worker)
                continue
            if not worker.connected:
                worker.connect(silent=True)
            for runner in worker.runners.values():
                runner.models.revive()
            worker.do(worker.tend)
            worker.do(worker.sweeper.sweep)
            worker.turn()
        self.fleet.pass_time(1.0)
        broker = self.fleet.broker
        return bool(
            broker.queues.waiting()
            or broker.leases
            or any(w.in_flight or w.stopping for w in self.workers)
            or self.runs()
        )
