"""Without the libraries of some engines, and with everything optional switched off, the rest serves."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.contract import EngineName, InferenceRequest
from shared.errors import NoEngineAvailable
from shared.registry import EngineInfo, ServedModel, WorkerInfo
from shared.routing import chain, choose
from shared.settings import Settings
from workers.devices.demand import demand_of
from workers.engines import engine_class
from workers.engines.base import Availability

pytestmark = pytest.mark.property
EXAMPLES = settings(max_examples=100, deadline=None, derandomize=True)

NEEDS: Mapping[EngineName, frozenset[str]] = MappingProxyType(
    {
        EngineName.VLLM: frozenset({"vllm"}),
        EngineName.DEEPSPEED: frozenset({"deepspeed", "torch", "transformers"}),
        EngineName.ONNX: frozenset({"onnxruntime", "transformers"}),
        EngineName.PYTORCH: frozenset({"torch", "transformers"}),
    }
)
FLEET = tuple(NEEDS)
LIBRARIES = sorted(frozenset().union(*NEEDS.values()))
OURS = re.compile(r"workers\.engines\..*")
REQUEST = InferenceRequest.parse({"model": "m", "inputs": {"prompt": "x"}})


@contextmanager
def without(libraries: Collection[str]) -> Iterator[None]:
    """As if these were not installed, in a process that has not imported an engine yet."""
    before = {name: module for name, module in sys.modules.items() if OURS.match(name) or name in libraries}
    for name in before:
        del sys.modules[name]
    sys.modules.update(dict.fromkeys(libraries))  # None: an import fails, and find_spec finds nothing
    try:
        yield
    finally:
        for name in [name for name in sys.modules if OURS.match(name) or name in libraries]:
            del sys.modules[name]
        sys.modules.update(before)
        for name, module in before.items():
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)


@cache
def availability(missing: frozenset[str]) -> Mapping[EngineName, Availability]:
    """What a worker that is to serve every queue finds on a machine without these libraries."""
    for engine in FLEET:
        engine_class(engine)  # what else its module needs is imported once, not anew each time
    with without(missing):
        return {engine: engine_class(engine).availability(Settings()) for engine in FLEET}


def worker_of(found: Mapping[EngineName, Availability]) -> WorkerInfo:
    """A worker as it announces itself: engines that cannot run here have no model, only a reason."""
    engines = tuple(
        EngineInfo(name=name, models={"m": ServedModel(kinds=(REQUEST.kind,))})
        if here.ok
        else EngineInfo(name=name, failed={"m": here.reason})
        for name, here in found.items()
    )
    return WorkerInfo(id="w", host="h", pid=1, started=0.0, queues=tuple(found), engines=engines)


# Feature: advanced-optimization-monitoring, Property 51: a library that is not installed is passed over
@EXAMPLES
@given(missing=st.frozensets(st.sampled_from(LIBRARIES)), order=st.permutations(FLEET))
def test_a_request_goes_to_the_first_engine_whose_libraries_are_here(missing, order) -> None:
    """Whatever is missing: its engines say so with what mends it, and the first preferred one of the others serves."""
    found = availability(missing)

    for engine, here in found.items():
        lacking = NEEDS[engine] & missing
        assert here.ok == (not lacking)
        assert all(library in here.reason for library in lacking)
        assert here.ok or f'pip install "muai-fleet[{engine}' in here.remedy
    request = REQUEST.model_copy(update={"engine_preference": tuple(order)})
    able = [engine for engine in order if found[engine].ok]
    if able:
        assert choose(request, [worker_of(found)], Settings()) == able[0]
    else:
        with pytest.raises(NoEngineAvailable, match="not installed"):
            choose(request, [worker_of(found)], Settings())


SWITCHES = st.fixed_dictionaries(
    {},
    optional={
        "engine_preference": st.permutations(FLEET).flatmap(
            lambda order: st.integers(1, len(order)).map(lambda count: [*order[:count]])
        ),
        "vllm": st.fixed_dictionaries({"enabled": st.booleans(), "tensor_parallel_size": st.integers(1, 8)}),
        "deepspeed": st.fixed_dictionaries({"enabled": st.booleans(), "pipeline_parallel": st.integers(1, 8)}),
        "onnx": st.fixed_dictionaries({"enabled": st.booleans()}),
    },
)


# Feature: advanced-optimization-monitoring, Property 50: with everything optional switched off, plain PyTorch serves
@EXAMPLES
@given(
    configured=SWITCHES,
    preferred=st.none() | st.permutations(FLEET),
    alive=st.sets(st.sampled_from(FLEET)),
)
def test_with_the_master_switch_off_nothing_but_pytorch_is_used(configured, preferred, alive) -> None:
    """Whatever is configured beside it, preferred or alive: requests go to PyTorch or nowhere, which needs one GPU."""
    off = Settings.model_validate({"optimization": {**configured, "enabled": False}})
    request = REQUEST.model_copy(update={"engine_preference": tuple(preferred) if preferred else None})
    reachable = bool(preferred) or EngineName.PYTORCH in off.optimization.engine_preference
    worker = worker_of({engine: Availability(engine in alive, "not here") for engine in FLEET})

    assert chain(request, off) == ((EngineName.PYTORCH,) if reachable else ())
    if reachable and EngineName.PYTORCH in alive:
        assert choose(request, [worker], off) == EngineName.PYTORCH
    else:
        with pytest.raises(NoEngineAvailable):
            choose(request, [worker], off)
    others = [engine for engine in FLEET if engine is not EngineName.PYTORCH]
    assert demand_of(off.optimization, others).count == 0
    assert demand_of(off.optimization, FLEET).count == 1
