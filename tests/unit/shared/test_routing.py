"""Which engine a request goes to (properties 1, 2 and 52 of the specification)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from shared.contract import EngineName, Hop, InferenceRequest
from shared.errors import NoEngineAvailable, UnknownModel, UnsupportedKind
from shared.routing import chain, choose
from shared.routing import tried as left_alone
from shared.settings import Settings
from tests.support.registry import worker

FLEET = (EngineName.VLLM, EngineName.DEEPSPEED, EngineName.ONNX, EngineName.PYTORCH)
SETTINGS = Settings()


def request(**fields: object) -> InferenceRequest:
    """A request for model m."""
    return InferenceRequest.parse({"model": "m", "inputs": {"prompt": "x"}, **fields})


# Feature: advanced-optimization-monitoring, Property 1: the first live engine of the preference serves
@given(alive=st.sets(st.sampled_from(FLEET), min_size=1), order=st.permutations(FLEET))
@hypothesis_settings(max_examples=150, deadline=None)
def test_the_first_live_engine_of_the_preference_is_chosen(alive: set[EngineName], order: list[EngineName]) -> None:
    """Whatever lives and whatever is preferred, the first preferred engine that lives is taken."""
    chosen = choose(request(engine_preference=list(order)), [worker(*alive)], SETTINGS)

    assert chosen == next(engine for engine in order if engine in alive)


def test_workers_that_still_load_are_for_requests_that_nobody_else_takes() -> None:
    """An engine that takes requests goes before an earlier one that loads; where all load, the first is waited for."""
    loading, ready = worker(*FLEET[:2], ready=False), worker(FLEET[3])

    assert choose(request(), [loading, ready], SETTINGS) == FLEET[3]
    assert choose(request(), [loading], SETTINGS) == FLEET[0]
    assert choose(request(), [loading, ready], SETTINGS, [FLEET[3]]) == FLEET[0]


# Feature: advanced-optimization-monitoring, Property 2: what fails goes on to the next engine of the chain
@given(alive=st.sets(st.sampled_from(FLEET), min_size=1))
@hypothesis_settings(max_examples=100, deadline=None)
def test_failures_walk_down_the_chain_and_end(alive: set[EngineName]) -> None:
    """Failing again and again visits every live engine once, in the fleet's order, then says that none is left."""
    tried: list[EngineName] = []
    while len(tried) < len(alive):
        tried.append(choose(request(), [worker(*alive)], SETTINGS, tried))

    assert tried == [engine for engine in FLEET if engine in alive]
    with pytest.raises(NoEngineAvailable, match="already failed"):
        choose(request(), [worker(*alive)], SETTINGS, tried)


# Requirements: 13.3
@pytest.mark.parametrize("engine", FLEET)
def test_an_engine_that_is_switched_off_is_in_no_chain(engine: EngineName) -> None:
    """Switched off, an engine is not chosen even if a worker for it lives."""
    settings = Settings.model_validate({"optimization": {engine.value: {"enabled": False}}})

    assert chain(request(), settings) == tuple(other for other in FLEET if other is not engine)


# Requirements: 13.1
def test_optimization_off_leaves_pytorch_only() -> None:
    """With the master switch off only the standard engine serves."""
    settings = Settings.model_validate({"optimization": {"enabled": False}})

    assert chain(request(), settings) == (EngineName.PYTORCH,)


def test_a_models_own_engines_bound_the_chain() -> None:
    """A model declared for some engines is not sent to others."""
    settings = Settings.model_validate({"models": {"catalog": {"m": {"path": "p", "engines": ["onnx"]}}}})

    assert chain(request(), settings) == (EngineName.ONNX,)


def test_refusals_say_what_there_is() -> None:
    """No model of that name, no such kind for it, nobody alive: three different errors."""
    alive = [worker(EngineName.ONNX)]

    with pytest.raises(UnknownModel, match="there are: m"):
        choose(request(model="other"), alive, SETTINGS)
    with pytest.raises(UnsupportedKind, match="it serves: generate"):
        choose(request(kind="embed", inputs={"texts": ["x"]}), alive, SETTINGS)
    with pytest.raises(NoEngineAvailable, match="celery -A workers worker -Q vllm"):
        choose(request(), [], SETTINGS)


def test_an_engine_that_was_out_of_service_may_be_tried_again() -> None:
    """An engine that failed with a request is left alone; one that was out of service only after the second time."""
    failed = Hop(engine="vllm", error="x", time=0.0)
    away = Hop(engine="onnx", error="died", time=0.0, outage=True)

    assert left_alone([failed, away]) == {EngineName.VLLM}
    assert left_alone([failed, away, away]) == {EngineName.VLLM, EngineName.ONNX}
