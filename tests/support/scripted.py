"""An engine that reports when a test says so."""

from __future__ import annotations

from dataclasses import dataclass, field

from shared.contract import EngineName, Kind, Usage
from shared.errors import FleetError
from shared.limits import LimitsInForce
from shared.settings import Settings
from workers.engines.base import EngineOutput
from workers.engines.fake import FakeEngine, answer
from workers.models.manager import ModelManager
from workers.path.batcher import Batch
from workers.path.runner import BatchDone, EngineRunner, Finished, Report
from workers.requests.inflight import InFlight
from workers.requests.rows import Part

ANSWER = EngineOutput({"text": "tac", "token_ids": [], "finish_reason": "stop"}, Usage(prompt_tokens=3))


@dataclass(eq=False)
class Run:
    """A batch in the engine's hands. ``unreported`` are its members whose outcome was not said yet."""

    batch: Batch[Part]
    unreported: list[Part] = field(default_factory=list)
    aborted: set[Part] = field(default_factory=set)


class ScriptedRunner(EngineRunner):
    """Keeps what it is given in ``runs`` until the test says what became of it. Its thread is never started.

    ``submitted`` are all batches, ``aborted`` all requests whose end it was told of.
    """

    def __init__(self, models: ModelManager, report: Report) -> None:
        super().__init__(models, report)
        self.loaded.set()
        self.runs: list[Run] = []
        self.submitted: list[Batch[Part]] = []
        self.aborted: list[InFlight] = []

    def submit(self, batch: Batch[Part]) -> None:
        """Its model is there: what runs begins."""
        self.submitted.append(batch)
        for part in batch.items:
            part.item.began = part.item.began or part.item.started
        self.runs.append(Run(batch, list(batch.items)))

    def abort(self, item: InFlight) -> None:
        """An engine knows requests by their ids."""
        self.aborted.append(item)
        for run in self.runs:
            run.aborted |= {member for member in run.unreported if member.id == item.id}

    def finish(self, run: Run, part: Part, outcome: EngineOutput | FleetError = ANSWER, seconds: float = 0.01) -> None:
        """Report one member; what has texts is answered as the fake engine would."""
        run.unreported.remove(part)
        if outcome is ANSWER and part.request.kind is not Kind.GENERATE:
            outcome = answer(part.request)
        self._report(Finished(part, outcome, len(run.batch.items), seconds * 1000))

    def end(self, run: Run, seconds: float = 0.01) -> None:
        """Report the end of a batch all of whose members were reported."""
        if run.unreported:
            raise ValueError("a batch ends when its members are through")
        self.runs.remove(run)
        self._report(BatchDone(run.batch, seconds))

    def complete(self, outcome: EngineOutput | FleetError = ANSWER) -> None:
        """Report everything that runs, and the ends of the batches."""
        for run in list(self.runs):
            for part in list(run.unreported):
                self.finish(run, part, outcome)
            self.end(run)

    def _accept(self, batch: Batch[Part]) -> None:
        raise NotImplementedError


class ScriptedEngine(FakeEngine):
    """The fake engine under the name of any other, with slots or without."""

    def __init__(self, settings: Settings, name: EngineName = EngineName.FAKE, slots: int | None = None) -> None:
        super().__init__(settings)
        self.name = name  # type: ignore[misc]
        self._slots = slots

    @property
    def slots(self) -> int | None:
        return self._slots


def scripted_models(
    settings: Settings, limits: LimitsInForce, name: EngineName = EngineName.FAKE, slots: int | None = None
) -> ModelManager:
    """The real manager, over the scripted engine."""
    return ModelManager(ScriptedEngine(settings, name, slots), settings, limits)
