"""Which models an engine has in memory: loaded on demand, rested when they fail, the least recently used let go."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from shared.contract import Feature, Kind
from shared.errors import BadRequest, EngineDied, EngineLoadError, FleetError, UnknownModel
from shared.features import EVERYWHERE
from shared.limits import Limits, LimitsInForce
from shared.registry import ServedModel, Weights
from shared.settings import ModelSpec, Settings
from workers.engines.base import Engine, LoadedModel, OnTokens
from workers.models.breaker import CircuitBreaker, State
from workers.models.loading import is_out_of_memory, let_go, said
from workers.models.weights import weights_of

logger = logging.getLogger(__name__)

Check = Callable[[LoadedModel], str]
"""Holds a loaded model to the reference: returns what came of it, raises :class:`EngineDisagrees` to refuse it."""


@dataclass(frozen=True, slots=True)
class ModelEvent:
    """What became of a model: ``action`` is load, unload, rest or back.

    ``seconds`` is how long loading or unloading took, or how long the rest is.
    """

    model: str
    action: str
    seconds: float
    reason: str = ""


class ModelManager:
    """The models of one engine. Loading and unloading are the engine's thread's; the rest may be asked by any."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        limits: LimitsInForce | None = None,
        check: Check = lambda model: "",
    ) -> None:
        self.engine = engine
        self._limits = limits or LimitsInForce(Limits.of(settings))
        self._check = check
        self._catalog = {name: spec for name, spec in settings.models.catalog.items() if spec.served_by(engine.name)}
        self._loaded: OrderedDict[str, LoadedModel] = OrderedDict()
        self._parity: dict[str, str] = {}
        self._weights: dict[str, Weights] = {}
        self._outdated: Mapping[str, FleetError] = {}
        self._breakers = {name: CircuitBreaker(self._limits.now.breaker) for name in self._catalog}
        self._lock = threading.Lock()
        self._on_tokens: OnTokens | None = None
        self.loading: str | None = None
        """The model that is being loaded, or tried again."""
        self.on_change: Callable[[], None] = lambda: None
        self.on_event: Callable[[ModelEvent], None] = lambda event: None

    @property
    def limits(self) -> LimitsInForce:
        """What is in force here."""
        return self._limits

    def get(self, name: str) -> LoadedModel:
        """The model, loaded if it was not; the least recently used one goes where there are too many.

        Raises :class:`UnknownModel` and :class:`~shared.errors.EngineLoadError`. While a model rests after a failure,
        that failure is raised at once: requests go on to the next engine without waiting for it.
        """
        spec = self._catalog.get(name)
        if spec is None:
            raise UnknownModel(f"no model named {name!r} is declared for the {self.engine.name} engine")
        error = self._breakers[name].error
        if error is not None:
            raise error
        model = self._loaded.get(name)
        if model is None:
            return self._load(spec)
        if not model.alive:
            raise EngineDied(f"the {self.engine.name} engine's process for {name!r} has died")
        self._loaded.move_to_end(name)
        return model

    def find(self, name: str) -> LoadedModel | None:
        """The model, where it is loaded."""
        return self._loaded.get(name)

    @property
    def on_tokens(self) -> OnTokens | None:
        """What listens to the tokens of every model; see :attr:`LoadedModel.on_tokens`. May be set at any time."""
        return self._on_tokens

    @on_tokens.setter
    def on_tokens(self, listener: OnTokens | None) -> None:
        self._on_tokens = listener
        for model in list(self._loaded.values()):
            model.on_tokens = listener

    def unload(self, name: str, reason: str) -> bool:
        """Let a model go; ``False`` where it is not loaded."""
        model = self._loaded.pop(name, None)
        if model is None:
            return False
        self._weights.pop(name, None)
        started = time.perf_counter()
        model.close()
        self._record(ModelEvent(name, "unload", time.perf_counter() - started, reason))
        return True

    def unload_others(self, name: str, reason: str) -> None:
        """Let every model but one go: it needs their memory."""
        for other in [other for other in self._loaded if other != name]:
            self.unload(other, reason)

    def close(self) -> None:
        """Let every model go, then the engine."""
        for name in list(self._loaded):
            self.unload(name, "shutdown")
        self.engine.close()

    # -- failures and rests -----------------------------------------------------------------------------------------

    def succeeded(self, name: str) -> None:
        """A request was answered with the model."""
        breaker = self._breakers.get(name)
        if breaker is not None and breaker.state is not State.OPEN:
            breaker.succeeded()

    def failed(self, name: str, error: FleetError) -> None:
        """A request failed with an engine's error: enough of these in a row, or one outage, and the model rests."""
        breaker = self._breakers.get(name)
        if breaker is None:
            return
        with self._lock:
            breaker.settings = self._limits.now.breaker
            opened = breaker.failed(error, time.monotonic())
        if opened:
            rest = max(0.0, breaker.due - time.monotonic())
            logger.error("%s: %s rests for %.0f s: %s", self.engine.name, name, rest, error)
            self.on_event(ModelEvent(name, "rest", rest, type(error).__name__))
            self.on_change()

    def revive(self) -> bool:
        """Try the models whose rest is over, loading those that are not (any longer) in memory; whether one is back."""
        back = False
        for name, breaker in self._breakers.items():
            if breaker.state is not State.OPEN or time.monotonic() < breaker.due:
                continue
            model = self._loaded.get(name)
            self.loading = name
            try:
                if model is not None and model.alive:
                    self._parity[name] = self._check(model)
                else:
                    self.unload(name, "it had died")
                    self._load(self._catalog[name], on_trial=True)
            except Exception as error:  # noqa: BLE001  # the boundary: whatever an engine raises, the trial has failed
                failure = error if isinstance(error, FleetError) else EngineLoadError(f"the trial failed: {error}")
                breaker.try_again()  # half open: the next failure opens it again, for longer
                self.failed(name, failure)
                continue
            finally:
                self.loading = None
            breaker.try_again()
            back = True
            logger.info("%s: %s is back", self.engine.name, name)
            self.on_event(ModelEvent(name, "back", 0.0))
        return back

    def revive_at(self) -> float:
        """The monotonic time at which the next rest is over."""
        return min((b.due for b in self._breakers.values() if b.state is State.OPEN), default=float("inf"))

    # -- what can be asked ------------------------------------------------------------------------------------------

    def declares(self, name: str) -> bool:
        """Whether the model is declared for this engine."""
        return name in self._catalog

    def serves(self, name: str, kind: Kind, features: frozenset[Feature] = frozenset()) -> bool:
        """Whether a request of this kind for this model can be tried here."""
        spec = self._catalog.get(name)
        if spec is None or self._error(name) is not None or not features <= self.engine.features | EVERYWHERE:
            return False
        model = self._loaded.get(name)
        return kind in (spec.kinds if model is None else model.kinds)

    def status(self) -> dict[str, ServedModel]:
        """The models that can be asked now."""
        found = {}
        for name, spec in self._catalog.items():
            if self._error(name) is not None:
                continue
            model = self._loaded.get(name)
            if model is None:
                found[name] = ServedModel(kinds=spec.kinds)
            else:
                found[name] = ServedModel(
                    kinds=tuple(sorted(model.kinds)), loaded=True, parity=self._parity.get(name, ""), notes=model.notes
                )
        return found

    def failures(self) -> dict[str, FleetError]:
        """The models that cannot be asked now, and why."""
        return {name: error for name in self._catalog if (error := self._error(name)) is not None}

    def _error(self, name: str) -> FleetError | None:
        return self._breakers[name].error or self._outdated.get(name)

    def weights(self) -> dict[str, Weights]:
        """What the files of the loaded models were when they were loaded."""
        return dict(self._weights)

    def outdate(self, models: Mapping[str, FleetError]) -> bool:
        """Serve these, by name with the reason, no longer, though loaded; whether they are others than before."""
        before, self._outdated = self._outdated, models
        return before.keys() != models.keys()

    def _load(self, spec: ModelSpec, on_trial: bool = False) -> LoadedModel:
        self.loading = spec.name
        try:
            with said(self.engine.name, spec.name):
                return self._load_anew(spec, on_trial)
        finally:
            self.loading = None

    def _load_anew(self, spec: ModelSpec, on_trial: bool) -> LoadedModel:
        while len(self._loaded) >= (most := self._limits.now.max_cached):
            self.unload(next(iter(self._loaded)), f"max_cached ({most}) reached")
        started = time.perf_counter()
        weights = weights_of(spec.path)
        try:
            model = self._fitted(spec)
        except BadRequest:
            raise
        except Exception as error:
            let_go(error)  # it may be kept for as long as the model rests
            failure = (
                error
                if isinstance(error, FleetError) and error.outage
                else EngineLoadError(f"the {self.engine.name} engine cannot load {spec.name!r}: {_told(error)}")
            )
            if not on_trial:
                self.failed(spec.name, failure)
            raise failure from error
        if weights is not None:
            self._weights[spec.name] = weights
        self._loaded[spec.name] = model
        model.on_death = partial(self.failed, spec.name)
        model.on_tokens = self._on_tokens
        self._record(ModelEvent(spec.name, "load", time.perf_counter() - started))
        return model

    def _fitted(self, spec: ModelSpec) -> LoadedModel:
        """The model in memory; where there is too little for it, the others go first."""
        try:
            return self._tried(spec)
        except Exception as error:
            if not self._loaded or not is_out_of_memory(error):
                raise
            let_go(error)
        self.unload_others(spec.name, f"out of memory, which {spec.name} needs")
        return self._tried(spec)

    def _tried(self, spec: ModelSpec) -> LoadedModel:
        """The model in memory, warmed up and held to the reference."""
        model = self.engine.load(spec)
        try:
            model.warmup()
            self._parity[spec.name] = self._check(model)
        except BaseException:
            model.close()
            raise
        return model

    def _record(self, event: ModelEvent) -> None:
        self.on_event(event)
        logger.info(
            "%s: %s of %s took %.2f s%s", self.engine.name, event.action, event.model, event.seconds,
            f" ({event.reason})" if event.reason else "",
        )  # fmt: skip


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, FleetError) else f"{type(error).__name__}: {error}"
