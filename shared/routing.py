"""Which engine a request goes to: the same rule where it is submitted and where it fails."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from shared.contract import EngineName, Hop, InferenceRequest
from shared.errors import NoEngineAvailable, UnknownModel, UnsupportedKind
from shared.registry import WorkerInfo
from shared.settings import Settings

OUTAGES = 2
"""How often an engine may be out of service in the course of one request before the request leaves it alone."""


def chain(request: InferenceRequest, settings: Settings) -> tuple[EngineName, ...]:
    """The engines that may serve the request, best first.

    The engines that the request prefers come first, then those of the model's preference (the fleet's, where it has
    none). What the configuration switches off, or the model's declaration leaves out, is not in it.
    """
    spec = settings.models.catalog.get(request.model)
    usual = (spec.engine_preference if spec is not None else None) or settings.optimization.engine_preference
    return tuple(
        engine
        for engine in dict.fromkeys([*(request.engine_preference or ()), *usual])
        if settings.optimization.engine_enabled(engine) and (spec is None or spec.served_by(engine))
    )


def tried(hops: Iterable[Hop]) -> set[EngineName]:
    """The engines that are not to be tried again with the request that has this history.

    An engine that was out of service may be: the fault was not the request's. But a request during which an engine died
    :data:`OUTAGES` times may well be what kills it.
    """
    hops = list(hops)
    outages = Counter(hop.engine for hop in hops if hop.outage)
    return {hop.engine for hop in hops if not hop.outage or outages[hop.engine] >= OUTAGES}


def choose(
    request: InferenceRequest,
    workers: Iterable[WorkerInfo],
    settings: Settings,
    passed: Collection[EngineName] = (),
) -> EngineName:
    """The first engine of the chain that has a live worker able to serve the request, ``passed`` left out.

    Where none of them takes requests yet, the first whose worker will when it has loaded its models.

    Raises :class:`UnknownModel` or :class:`UnsupportedKind` where live workers are there but none has the model or
    answers this kind with it, and :class:`NoEngineAvailable` where no engine of the chain is alive.
    """
    workers = list(workers)
    candidates = [engine for engine in chain(request, settings) if engine not in passed]
    for ready in (True, False):
        there = [worker for worker in workers if worker.ready is ready]
        for engine in candidates:
            if any(worker.serves(engine, request.model, request.kind, request.features) for worker in there):
                return engine
    if not passed:
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
        + (f"; already failed: {', '.join(sorted(passed))}" if passed else "")
        + (f"; {reasons}" if reasons else "")
        + ". Start one with: celery -A workers worker -Q "
        + (candidates[0] if candidates else "pytorch")
    )


def park(request: InferenceRequest, workers: Iterable[WorkerInfo], settings: Settings) -> EngineName | None:
    """The engine on whose queue a request with a deadline may wait while no engine can serve it.

    One that has the model and rests comes first, then the first of the chain; ``None`` where the chain is empty.
    """
    candidates = chain(request, settings)
    resting = {info.name for worker in workers for info in worker.engines if request.model in info.failed}
    return next((engine for engine in candidates if engine in resting), candidates[0] if candidates else None)


def _explain_refusal(request: InferenceRequest, workers: list[WorkerInfo]) -> None:
    """Raise what is wrong with the request itself, as far as the live workers know."""
    engines = [info for worker in workers for info in worker.engines]
    if any(request.model in info.failed for info in engines):
        return
    offered = {name: model for info in engines for name, model in info.models.items()}
    if not offered:
        return
    if request.model not in offered:
        raise UnknownModel(
            f"no live worker has a model named {request.model!r}; there are: {', '.join(sorted(offered))}"
        )
    able = [
        info for info in engines if request.model in info.models and request.kind in info.models[request.model].kinds
    ]
    if not able:
        kinds = ", ".join(offered[request.model].kinds)
        raise UnsupportedKind(f"model {request.model!r} does not serve {request.kind} requests; it serves: {kinds}")
    if not any(request.features <= set(info.features) for info in able):
        raise UnsupportedKind(
            f"none of the live engines of model {request.model!r} ({', '.join(sorted({info.name for info in able}))}) "
            f"can do what params asks for: {', '.join(sorted(request.features))}"
        )
