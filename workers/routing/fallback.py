"""Where a request goes when it cannot be answered here: the next engine, another worker of the queue, or nowhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shared.contract import EngineName, Hop, InferenceRequest
from shared.errors import EngineError, FleetError, NoEngineAvailable, UnknownModel, UnsupportedKind
from shared.registry import WorkerInfo
from shared.routing import chain, choose, tried
from shared.settings import Settings
from workers.models.manager import ModelManager
from workers.requests.ending import Ending
from workers.requests.inflight import MOST_PASSED, InFlight

logger = logging.getLogger(__name__)

PASS_ON_SECONDS = 0.02
"""How long a request that another worker of the queue must run stays out of reach of this one."""

WAIT_SECONDS = 0.5
"""How long a request that no engine can serve now waits before it is looked at again: within its deadline, or for as
long as a worker that can serve it loads its models."""


@dataclass(frozen=True, slots=True)
class FallbackDecision:
    """Go on to the queue of ``engine``; ``None`` is this queue again, after ``pause`` seconds.

    ``error`` is what failed here and goes into the history; ``None`` where nothing did.
    """

    engine: EngineName | None
    error: FleetError | None = None
    pause: float = PASS_ON_SECONDS


def ending_of(decision: FallbackDecision, item: InFlight, *, here: EngineName, now: float) -> Ending:
    """The decision carried out: a hop, or this queue again later. ``now`` is in seconds since the epoch."""
    if decision.engine is None:
        # The pause keeps it from coming straight back to the same worker.
        return Ending.delayed(item, min(now + decision.pause, item.last_moment() or float("inf")))
    return Ending.hops(item, decision.engine, decision.error, here=here, now=now)


class Fallback:
    """Decides for one engine of one worker. A decision that there is no way on is raised as the caller's error.

    ``models`` is ``None`` where the worker does not have that engine: it decides for a queue that nobody serves.
    ``clock`` tells seconds since the epoch.
    """

    def __init__(
        self,
        engine: EngineName,
        models: ModelManager | None,
        settings: Settings,
        worker_id: str,
        live_workers: Callable[[], Sequence[WorkerInfo]],
        refresh: Callable[[float], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.engine = engine
        self._models = models
        self._settings = settings
        self._worker_id = worker_id
        self._live_workers = live_workers
        self._refresh = refresh
        self._clock = clock

    def after_failure(self, request: InferenceRequest, hops: Sequence[Hop], error: FleetError) -> FallbackDecision:
        """The engine failed with ``error``. Raises the error with the history where no engine is left."""
        here = Hop(engine=self.engine, error=str(error), time=self._clock(), outage=error.outage)
        try:
            return FallbackDecision(self._next(request, [*hops, here]), error)
        except NoEngineAvailable:
            if error.outage and self._may_wait(request, [*hops, here]):
                return FallbackDecision(self.engine, error)
            history = "; ".join([*(f"{hop.engine}: {hop.error}" for hop in hops), f"{self.engine}: {error}"])
            raise type(error)(f"no engine could serve the request ({history})") from None

    def elsewhere(self, request: InferenceRequest, hops: Sequence[Hop], sent: float) -> FallbackDecision:
        """The request came to a queue whose engine cannot serve it here: another worker or engine may.

        This is rare, and a refusal is final, so it is decided on fresh news of who lives: at least as fresh as what its
        sender, at ``sent`` (seconds since the epoch), went by.
        """
        self._refresh(sent)
        peers = self._peers(request)
        if peers:
            return FallbackDecision(None, pause=PASS_ON_SECONDS if any(peer.ready for peer in peers) else WAIT_SECONDS)
        error = self._models.failures().get(request.model) if self._models is not None else None
        try:
            return FallbackDecision(self._next(request, hops), error)
        except NoEngineAvailable as unavailable:
            refusal = self._refusal(request, unavailable)
            if refusal is unavailable and self._may_wait(request, hops):
                return FallbackDecision(None, None, WAIT_SECONDS)
            if error is not None and refusal is unavailable:
                raise EngineError(f"{self.engine}: {error}; {unavailable}") from None
            raise refusal from None

    def another(self, item: InFlight, request: InferenceRequest) -> str | None:
        """Another live worker of this queue that has not said yet that it cannot answer the request in time.

        Where none is known it is asked for: what follows is a refusal.
        """
        if len(item.passed) >= MOST_PASSED:
            return None
        left = self._untold(item, request)
        if not left:
            self._refresh(item.sent)
            left = self._untold(item, request)
        return min(left, key=lambda worker: (worker.in_flight, hash((item.id, worker.id)))).id if left else None

    def _untold(self, item: InFlight, request: InferenceRequest) -> list[WorkerInfo]:
        return [worker for worker in self._peers(request) if worker.id not in item.passed]

    def carried_out(self, decision: FallbackDecision, item: InFlight, now: float) -> Ending:
        """The decision as the request's way on, which is logged. ``now`` is in seconds since the epoch."""
        if decision.engine is not None and decision.error is not None:
            name = type(decision.error).__name__
            logger.warning("request %s hops from %s to %s: %s", item.id, self.engine, decision.engine, name)
        return ending_of(decision, item, here=self.engine, now=now)

    def _next(self, request: InferenceRequest, hops: Sequence[Hop]) -> EngineName:
        return choose(request, self._live_workers(), self._settings, {self.engine, *tried(hops)})

    def _may_wait(self, request: InferenceRequest, hops: Sequence[Hop]) -> bool:
        """Whether an engine that is out of service now may be back within the deadline."""
        left = set(chain(request, self._settings)) - tried(hops)
        return bool(left) and request.deadline is not None and request.deadline > self._clock() + WAIT_SECONDS

    def _peers(self, request: InferenceRequest) -> list[WorkerInfo]:
        """The other live workers of this queue that can serve the request, now or when they have loaded."""
        return [
            worker
            for worker in self._live_workers()
            if worker.id != self._worker_id
            and worker.serves(self.engine, request.model, request.kind, request.features)
        ]

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
