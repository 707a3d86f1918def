"""Which models an engine has in memory: loaded on demand, kept, and the least recently used let go."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from dataclasses import dataclass

from shared.contract import Kind
from shared.errors import BadRequest, EngineLoadError, FleetError, UnknownModel
from shared.settings import ModelSpec, Settings
from workers.engines.base import Engine, LoadedModel

logger = logging.getLogger(__name__)

RETRY_LOAD_SECONDS = 30.0
"""How long a model that could not be loaded is refused before it is tried again."""


@dataclass(frozen=True, slots=True)
class ModelEvent:
    """A model was loaded or unloaded. ``seconds`` is how long that took."""

    model: str
    action: str
    seconds: float
    reason: str = ""


class ModelManager:
    """The models of one engine. Used by the engine's thread only; :meth:`status` by any."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine = engine
        self._max_cached = settings.models.max_cached
        self._catalog = {name: spec for name, spec in settings.models.catalog.items() if spec.served_by(engine.name)}
        self._loaded: OrderedDict[str, LoadedModel] = OrderedDict()
        self._failed: dict[str, tuple[float, FleetError]] = {}
        self.events: list[ModelEvent] = []

    def get(self, name: str) -> LoadedModel:
        """The model, loaded if it was not; the least recently used one goes where there are too many.

        Raises :class:`UnknownModel` and :class:`~shared.errors.EngineLoadError`. A load that failed is not tried again
        for :data:`RETRY_LOAD_SECONDS`: requests go on to the next engine without waiting for it.
        """
        model = self._loaded.get(name)
        if model is not None:
            self._loaded.move_to_end(name)
            return model
        spec = self._catalog.get(name)
        if spec is None:
            raise UnknownModel(f"no model named {name!r} is declared for the {self.engine.name} engine")
        failure = self._failed.get(name)
        if failure is not None and time.monotonic() - failure[0] < RETRY_LOAD_SECONDS:
            raise failure[1]
        return self._load(spec)

    def unload(self, name: str, reason: str) -> bool:
        """Let a model go; ``False`` where it is not loaded."""
        model = self._loaded.pop(name, None)
        if model is None:
            return False
        started = time.perf_counter()
        model.close()
        self._record(ModelEvent(name, "unload", time.perf_counter() - started, reason))
        return True

    def close(self) -> None:
        """Let every model go, then the engine."""
        for name in list(self._loaded):
            self.unload(name, "shutdown")
        self.engine.close()

    def declares(self, name: str) -> bool:
        """Whether the model is declared for this engine."""
        return name in self._catalog

    def serves(self, name: str, kind: Kind) -> bool:
        """Whether a request of this kind for this model can be tried here."""
        if name in self._failed and name not in self._loaded:
            return False
        model = self._loaded.get(name)
        if model is not None:
            return kind in model.kinds
        spec = self._catalog.get(name)
        return spec is not None and kind in spec.kinds

    def status(self) -> dict[str, tuple[tuple[Kind, ...], bool]]:
        """What can be asked of each model here, and whether it is loaded. Models that failed to load are left out."""
        loaded = dict(self._loaded)
        failed = dict(self._failed)
        return {
            name: (tuple(sorted(loaded[name].kinds)) if name in loaded else spec.kinds, name in loaded)
            for name, spec in self._catalog.items()
            if name not in failed
        }

    def failures(self) -> dict[str, str]:
        """The models that could not be loaded, and why."""
        return {name: str(error) for name, (_, error) in dict(self._failed).items()}

    def _load(self, spec: ModelSpec) -> LoadedModel:
        while len(self._loaded) >= self._max_cached:
            self.unload(next(iter(self._loaded)), f"max_cached ({self._max_cached}) reached")
        started = time.perf_counter()
        try:
            model = self.engine.load(spec)
            model.warmup()
        except BadRequest:
            raise
        except FleetError as error:
            self._fail(spec, error)
            raise
        except Exception as error:
            wrapped = EngineLoadError(
                f"the {self.engine.name} engine cannot load {spec.name!r}: {type(error).__name__}: {error}"
            )
            self._fail(spec, wrapped)
            raise wrapped from error
        self._failed.pop(spec.name, None)
        self._loaded[spec.name] = model
        self._record(ModelEvent(spec.name, "load", time.perf_counter() - started))
        return model

    def _fail(self, spec: ModelSpec, error: FleetError) -> None:
        self._failed[spec.name] = (time.monotonic(), error)
        logger.error("%s: cannot load %s: %s", self.engine.name, spec.name, error)

    def _record(self, event: ModelEvent) -> None:
        self.events.append(event)
        del self.events[:-100]
        logger.info(
            "%s: %s of %s took %.2f s%s", self.engine.name, event.action, event.model, event.seconds,
            f" ({event.reason})" if event.reason else "",
        )  # fmt: skip
