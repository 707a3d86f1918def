"""Where a request goes when it cannot be answered here: the next engine, another worker of the queue, or nowhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shared.contract import EngineName, Hop, InferenceRequest
from shared.errors import EngineLoadError, FleetError, NoEngineAvailable, UnknownModel, UnsupportedKind
from shared.registry import WorkerInfo
from shared.routing import choose
from shared.settings import Settings
from workers.models import ModelManager


@dataclass(frozen=True, slots=True)
class FallbackDecision:
    """Go on to the queue of ``engine``; ``None`` is this queue, for another of its workers.

    ``error`` is what failed here and goes into the history; ``None`` where nothing did.
    """

    engine: EngineName | None
    error: FleetError | None


class Fallback:
    """Decides for one engine of one worker. A decision that there is no way on is raised as the caller's error."""

    def __init__(
        self,
        models: ModelManager,
        settings: Settings,
        worker_id: str,
        live_workers: Callable[[], Sequence[WorkerInfo]],
        refresh: Callable[[], None],
    ) -> None:
        self._engine = models.engine.name
        self._models = models
        self._settings = settings
        self._worker_id = worker_id
        self._live_workers = live_workers
        self._refresh = refresh

    def after_failure(self, request: InferenceRequest, hops: Sequence[Hop], error: FleetError) -> FallbackDecision:
        """The engine failed with ``error``. Raises the error with the history where no engine is left."""
        try:
            return FallbackDecision(self._next(request, hops), error)
        except NoEngineAvailable:
            history = "; ".join([*(f"{hop.engine}: {hop.error}" for hop in hops), f"{self._engine}: {error}"])
            raise type(error)(f"no engine could serve the request ({history})") from None

    def elsewhere(self, request: InferenceRequest, hops: Sequence[Hop]) -> FallbackDecision:
        """The request came to a queue whose engine cannot serve it here: another worker or engine may.

        This is rare, and a refusal is final, so it is decided on fresh news of who lives.
        """
        self._refresh()
        if self._peer_serves(request):
            return FallbackDecision(None, None)
        failure = self._models.failures().get(request.model)
        error = EngineLoadError(failure) if failure is not None else None
        try:
            return FallbackDecision(self._next(request, hops), error)
        except NoEngineAvailable as unavailable:
            raise error or self._refusal(request, unavailable) from None

    def _next(self, request: InferenceRequest, hops: Sequence[Hop]) -> EngineName:
        tried = {self._engine, *(hop.engine for hop in hops)}
        return choose(request, self._live_workers(), self._settings, tried)

    def _peer_serves(self, request: InferenceRequest) -> bool:
        return any(
            worker.serves(self._engine, request.model, request.kind)
            for worker in self._live_workers()
            if worker.id != self._worker_id
        )

    def _refusal(self, request: InferenceRequest, unavailable: NoEngineAvailable) -> FleetError:
        catalog = self._settings.models.catalog
        spec = catalog.get(request.model)
        if spec is None:
            known = ", ".join(sorted(catalog)) or "none"
            return UnknownModel(f"no model named {request.model!r} is declared; there are: {known}")
        if request.kind not in spec.kinds:
            kinds = ", ".join(spec.kinds)
            return UnsupportedKind(
                f"model {request.model!r} does not serve {request.kind} requests; it serves: {kinds}"
            )
        return unavailable
