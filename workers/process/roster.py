"""The engines of a worker: which can run here, those that it has, and what is announced of them."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable, Sequence

import redis

from shared.contract import EngineName
from shared.errors import ConfigurationError, MissingDependency
from shared.features import EVERYWHERE
from shared.limits import LimitsInForce
from shared.registry import EngineInfo, ServedModel
from shared.settings import ModelSpec, Settings
from workers.devices.devices import Devices
from workers.engines import engine_class
from workers.models.manager import ModelEvent, ModelManager
from workers.models.parity import ParityGate
from workers.observe.observers import Observers
from workers.path.intake import Intake, IntakeContext
from workers.path.runner import BatchRunner, ContinuousRunner, EngineRunner, Event, Finished

logger = logging.getLogger(__name__)

LONGEST_REASON = 500
"""Characters that are announced of why a model cannot be asked."""


class Roster:
    """What becomes of an engine: it can run here or not, it is expected, and then it is there.

    ``intakes`` are by queue. What is announced may be asked from any thread, the rest is the loop's.
    """

    def __init__(
        self, settings: Settings, limits: LimitsInForce, client: redis.Redis, devices: Devices, observers: Observers
    ) -> None:
        self.intakes: dict[str, Intake] = {}
        self.runners: list[EngineRunner] = []
        self._settings = settings
        self._limits = limits
        self._client = client
        self._devices = devices
        self._observers = observers
        self._absent: dict[EngineName, str] = {}
        self._expected: dict[EngineName, None] = {}

    # -- which can run here -----------------------------------------------------------------------------------------

    def check(self, name: EngineName) -> None:
        """Raise :class:`ConfigurationError` or :class:`MissingDependency` for an engine that cannot run here."""
        if not self._settings.optimization.engine_enabled(name):
            raise ConfigurationError(f"the {name} engine is switched off (optimization.{name}.enabled)")
        availability = engine_class(name).availability(self._settings)
        if not availability.ok:
            raise MissingDependency(f"the {name} engine cannot run here: {availability.reason}. {availability.remedy}")

    def installed(self, engines: Sequence[EngineName]) -> list[EngineName]:
        """Those of the engines whose libraries are here. Raises what :meth:`check` does where none are."""
        found = []
        for name in engines:
            try:
                self.check(name)
            except MissingDependency as error:
                self.without(name, error.message)
            else:
                found.append(name)
        if engines and not found:
            raise MissingDependency("; ".join(self._absent.values()))
        for reason in self._absent.values():
            logger.error("%s; the other engines serve", reason)
        return found

    # -- those that it has ------------------------------------------------------------------------------------------

    def expects(self, engines: Iterable[EngineName]) -> None:
        """These will be there soon."""
        self._expected.update(dict.fromkeys(engines))

    def expected(self, name: EngineName) -> bool:
        """Whether it will be there soon."""
        return name in self._expected

    def without(self, name: EngineName, reason: str) -> None:
        """It will not be there."""
        self._expected.pop(name, None)
        self._absent[name] = reason

    def models_of(self, name: EngineName) -> ModelManager:
        """The engine with its models, none of them loaded. Imports its libraries, which may take many seconds."""
        gate = ParityGate(name, self._settings, self._client)
        return ModelManager(engine_class(name)(self._settings), self._settings, self._limits, gate)

    def add(self, models: ModelManager, context: IntakeContext) -> Intake:
        """It is there. Its thread starts, and loads first what is to be preloaded."""
        name = models.engine.name

        def report(event: Event) -> None:
            if isinstance(event, Finished):
                self._devices.saw(event.outcome)
            self.intakes[name.value].report(event)

        def changed(event: ModelEvent) -> None:
            self._observers.post("model_changed", name, event)

        models.on_event = changed
        kind = BatchRunner if models.engine.slots is None else ContinuousRunner
        runner = kind(models, report, lambda: self._observers.listens("tokens_made"), context.clock)
        intake = self.intakes[name.value] = Intake(name.value, runner, context)
        self.runners.append(runner)
        self._expected.pop(name, None)
        self._absent.pop(name, None)
        preload = self._settings.monitoring.server.preload_models
        runner.start([model for model in preload if models.declares(model)])
        return intake

    # -- what is announced of them ----------------------------------------------------------------------------------

    def announced(self, queues: Container[str]) -> tuple[EngineInfo, ...]:
        """The engines of these queues."""
        there = {info.name: info for runner in list(self.runners) if (info := self._info(runner)).name.value in queues}
        coming = {
            name: EngineInfo(
                name=name,
                features=tuple(sorted(engine_class(name).features | EVERYWHERE)),
                models={model: ServedModel(kinds=spec.kinds) for model, spec in self._declared(name).items()},
            )
            for name in list(self._expected)
            if name.value in queues
        }
        absent = {
            name: EngineInfo(name=name, failed=dict.fromkeys(self._declared(name), reason))
            for name, reason in list(self._absent.items())
        }
        return tuple({**absent, **coming, **there}.values())

    def _info(self, runner: EngineRunner) -> EngineInfo:
        batcher = self._limits.now.batcher
        models = runner.models
        return EngineInfo(
            name=models.engine.name,
            features=tuple(sorted(models.engine.features | EVERYWHERE)),
            models=models.status(),
            max_batch_size=models.engine.slots or (batcher.max_batch_size if batcher.enabled else 1),
            failed={name: str(error)[:LONGEST_REASON] for name, error in models.failures().items()},
        )

    def _declared(self, engine: EngineName) -> dict[str, ModelSpec]:
        return {name: spec for name, spec in self._settings.models.catalog.items() if spec.served_by(engine)}
