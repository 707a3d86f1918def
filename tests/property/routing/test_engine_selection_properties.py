"""Which engine serves, and where a request goes when one fails: random fleets, models, preferences and failures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.contract import EngineName, Feature, Hop, InferenceRequest, Kind
from shared.errors import EngineDied, EngineError, EngineLoadError, FleetError
from shared.registry import EngineInfo, ServedModel, WorkerInfo
from shared.routing import OUTAGES, choose
from shared.settings import Settings
from workers.routing.fallback import Fallback

pytestmark = pytest.mark.property
EXAMPLES = settings(max_examples=120, deadline=None, derandomize=True)

FLEET = (EngineName.VLLM, EngineName.DEEPSPEED, EngineName.ONNX, EngineName.PYTORCH)
ENGINES = st.sampled_from(FLEET)
ORDERS = st.lists(ENGINES, min_size=1, unique=True)
SERVED = st.builds(
    EngineInfo,
    name=ENGINES,
    features=st.sampled_from([(), (Feature.LOGPROBS,), (Feature.LOGPROBS, Feature.JSON_SCHEMA)]),
    models=st.dictionaries(
        st.sampled_from(["m", "other"]),
        st.sampled_from([ServedModel(kinds=(Kind.GENERATE,)), ServedModel(kinds=(Kind.EMBED,))]),
    ),
)
WORKERS = st.lists(st.lists(SERVED, min_size=1, max_size=3, unique_by=lambda info: info.name), max_size=5).map(
    lambda all_served: [worker(f"w{number}", served) for number, served in enumerate(all_served)]
)
SWITCHED_OFF = st.sets(ENGINES, max_size=2)


def worker(name: str, served: Sequence[EngineInfo]) -> WorkerInfo:
    """A live worker with these engines."""
    queues = tuple(info.name for info in served)
    return WorkerInfo(id=name, host="h", pid=1, started=0.0, queues=queues, engines=tuple(served))


def everywhere(engines: Sequence[EngineName]) -> list[WorkerInfo]:
    """A worker for each engine, with the model."""
    models = {"m": ServedModel(kinds=(Kind.GENERATE,))}
    return [worker(f"on-{name}", [EngineInfo(name=name, models=models)]) for name in engines]


def request(**fields: object) -> InferenceRequest:
    """A request for model m."""
    return InferenceRequest.parse({"model": "m", "inputs": {"prompt": "x"}, **fields})


# Feature: advanced-optimization-monitoring, Property 1: the first live engine of the preference serves
@EXAMPLES
@given(
    workers=WORKERS,
    fleets=ORDERS,
    models=st.none() | ORDERS,
    requests=st.none() | ORDERS,
    allowed=st.none() | st.sets(ENGINES, min_size=1),
    off=SWITCHED_OFF,
    logprobs=st.none() | st.just(2),
)
def test_the_best_engine_that_is_there_and_able_serves(workers, fleets, models, requests, allowed, off, logprobs):
    """The request's order counts before the model's, that before the fleet's; who may not or cannot is left out."""
    catalog = {"path": "p", "engines": sorted(allowed) if allowed else None, "engine_preference": models}
    configured = Settings.model_validate(
        {
            "optimization": {"engine_preference": fleets, **{name: {"enabled": False} for name in off}},
            "models": {"catalog": {"m": catalog}},
        }
    )
    asked = request(engine_preference=requests, params={"logprobs": logprobs})

    wanted = [*(requests or []), *(models or fleets)]
    able = {
        info.name
        for one in workers
        for info in one.engines
        if "m" in info.models
        and Kind.GENERATE in info.models["m"].kinds
        and (logprobs is None or Feature.LOGPROBS in info.features)
    }
    best = next((name for name in wanted if name in able - off and name in (allowed or FLEET)), None)
    if best is not None:
        assert choose(asked, workers, configured) == best
    else:
        with pytest.raises(FleetError):
            choose(asked, workers, configured)


def journey(
    asked: InferenceRequest, alive: Sequence[EngineName], fails: Mapping[EngineName, FleetError]
) -> tuple[list[EngineName], FleetError | None]:
    """The engines that a request visits until one answers, or until an error is told to its caller."""
    configured, workers = Settings(), everywhere(alive)
    hops: list[Hop] = []
    visited: list[EngineName] = []
    here = choose(asked, workers, configured)
    while len(visited) <= OUTAGES * len(FLEET):
        visited.append(here)
        error = fails.get(here)
        if error is None:
            return visited, None
        fallback = Fallback(here, None, configured, f"on-{here}", lambda: workers, lambda since: None)
        try:
            decision = fallback.after_failure(asked, hops, error)
        except FleetError as told:
            return visited, told
        assert decision.error is error
        assert decision.engine is not None
        hops.append(Hop(engine=here, error=str(error), time=0.0, outage=error.outage))
        here = decision.engine
    raise AssertionError(f"the request wanders about: {visited}")


# Feature: advanced-optimization-monitoring, Property 2: what fails goes on to the next engine of the chain
@EXAMPLES
@given(
    alive=st.sets(ENGINES, min_size=1),
    order=st.none() | st.permutations(FLEET),
    failing=st.sets(ENGINES),
)
def test_failures_lead_down_the_chain_to_the_first_engine_that_answers(alive, order, failing):
    """Each live engine is tried once, in order; when all have failed the caller is told of every one of them."""
    fails = {name: EngineError(f"{name} is unwell") for name in failing}

    visited, told = journey(request(engine_preference=order), sorted(alive), fails)

    chain = [name for name in order or FLEET if name in alive]
    answers = next((name for name in chain if name not in failing), None)
    assert visited == (chain if answers is None else chain[: chain.index(answers) + 1])
    assert (told is None) == (answers is not None)
    if told is not None:
        places = [told.message.index(f"{name}: {name} is unwell") for name in chain]
        assert places == sorted(places)


ERRORS = st.sampled_from([EngineError("unwell"), EngineDied("died"), EngineLoadError("no such file")])


# Feature: advanced-optimization-monitoring, Property 2: what fails goes on to the next engine of the chain
@EXAMPLES
@given(alive=st.sets(ENGINES, min_size=1), fails=st.dictionaries(ENGINES, ERRORS), order=st.permutations(FLEET))
def test_an_engine_that_was_out_of_service_is_tried_again_but_not_for_ever(alive, fails, order):
    """One that failed with the request is left alone; one that was away may be asked again, but not endlessly."""
    visited, told = journey(request(engine_preference=order), sorted(alive), fails)

    for name in alive:
        error = fails.get(name)
        assert visited.count(name) <= (OUTAGES if error is not None and error.outage else 1)
    well = alive - fails.keys()
    assert (told is None) == bool(well)
    if told is None:
        assert visited[-1] in well
    else:
        assert set(visited) == alive, "nobody gives up before every engine was tried"


# Feature: advanced-optimization-monitoring, Property 2: what fails goes on to the next engine of the chain
@EXAMPLES
@given(workers=WORKERS, here=ENGINES, tried=st.lists(st.tuples(ENGINES, st.booleans()), max_size=5))
def test_nothing_is_sent_where_it_cannot_be_served(workers, here, tried):
    """Whatever the history: the next engine is alive, able, not this one, and not one that has failed with it."""
    hops = [Hop(engine=name, error="x", time=0.0, outage=outage) for name, outage in tried]
    fallback = Fallback(here, None, Settings(), "w0", lambda: workers, lambda since: None)
    worn = {name for name in FLEET if tried.count((name, True)) >= OUTAGES}
    left_alone = worn | {here} | {name for name, outage in tried if not outage}
    able = [name for name in FLEET if any(one.serves(name, "m", Kind.GENERATE) for one in workers)]
    best = next((name for name in able if name not in left_alone), None)

    if best is not None:
        assert fallback.after_failure(request(), hops, EngineError("unwell")).engine == best
    else:
        with pytest.raises(EngineError, match=f"no engine could serve the request .*{here}: unwell"):
            fallback.after_failure(request(), hops, EngineError("unwell"))
