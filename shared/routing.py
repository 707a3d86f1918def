"""Which engine a request goes to: the same rule where it is submitted and where it fails."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from shared.contract import EngineName, InferenceRequest
from shared.errors import NoEngineAvailable, UnknownModel, UnsupportedKind
from shared.registry import WorkerInfo
from shared.settings import Settings


def chain(request: InferenceRequest, settings: Settings) -> tuple[EngineName, ...]:
    """The engines that may serve the request, best first.

    The request's own preference comes before the fleet's. What the configuration switches off, or the model's
    declaration leaves out, is not in it.
    """
    preference = request.engine_preference or settings.optimization.engine_preference
    spec = settings.models.catalog.get(request.model)
    return tuple(
        engine
        for engine in preference
        if settings.optimization.engine_enabled(engine) and (spec is None or spec.served_by(engine))
    )


def choose(
    request: InferenceRequest,
    workers: Iterable[WorkerInfo],
    settings: Settings,
    tried: Collection[EngineName] = (),
) -> EngineName:
    """The first engine of the chain that has a live worker able to serve the request.

    Raises :class:`UnknownModel` or :class:`UnsupportedKind` where live workers are there but none has the model or
    answers this kind with it, and :class:`NoEngineAvailable` where no engine of the chain is alive.
    """
    workers = list(workers)
    candidates = [engine for engine in chain(request, settings) if engine not in tried]
    for engine in candidates:
        if any(worker.serves(engine, request.model, request.kind) for worker in workers):
            return engine
    if not tried:
        _explain_refusal(request, workers)
    names = ", ".join(candidates) or "none"
    reasons = "; ".join(
        f"{info.name}: {info.failed[request.model]}"
        for worker in workers
        for info in worker.engines
        if request.model in info.failed
    )
    raise NoEngineAvailable(
        f"no live worker can serve model {request.model!r} ({request.kind}); engines considered: {names}"
        + (f"; already failed: {', '.join(tried)}" if tried else "")
        + (f"; {reasons}" if reasons else "")
        + ". Start one with: celery -A workers worker -Q "
        + (candidates[0] if candidates else "pytorch")
    )


def _explain_refusal(request: InferenceRequest, workers: list[WorkerInfo]) -> None:
    offered = {name: model for worker in workers for info in worker.engines for name, model in info.models.items()}
    if not offered:
        return
    if request.model not in offered:
        raise UnknownModel(
            f"no live worker has a model named {request.model!r}; there are: {', '.join(sorted(offered))}"
        )
    if not any(
        request.model in info.models and request.kind in info.models[request.model].kinds
        for worker in workers
        for info in worker.engines
    ):
        kinds = ", ".join(offered[request.model].kinds)
        raise UnsupportedKind(f"model {request.model!r} does not serve {request.kind} requests; it serves: {kinds}")
