"""Without the libraries of some engines, and with everything optional switched off, the rest serves."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType

import pytest
import redis
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.contract import EngineName, InferenceRequest
from shared.errors import NoEngineAvailable
from shared.limits import Limits, LimitsInForce
from shared.registry import EngineInfo, ServedModel, WorkerInfo
from shared.routing import chain, choose
from shared.settings import ModelSpec, Settings
from shared.settings_loader import load_settings
from workers.devices.demand import demand_of
from workers.devices.devices import Devices
from workers.devices.nvml import Detected
from workers.engines import engine_class
from workers.engines.base import Availability
from workers.engines.fake import FakeEngine
from workers.engines.vllm.options import engine_arguments
from workers.path.waiting_room import WaitingRoom
from workers.requests.inflight import InFlight

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a configuration is."""
    return tmp_path_factory.mktemp("configuration")


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


def may_serve(engine: EngineName, configured: Settings) -> bool:
    """Whether a request may go to this engine."""
    return engine in chain(REQUEST, configured)


def runs_together(configured: Settings) -> bool:
    """Whether two alike requests that wait run in one batch."""
    room = WaitingRoom(FakeEngine(configured), LimitsInForce(Limits.of(configured)))
    for lease in ("1", "2"):
        room.add(InFlight(lease, "fake", {}, {}, "", 0.0), REQUEST, 0.0)
    batch = room.next_batch(configured.optimization.batcher.batch_timeout_ms)
    return batch is not None and len(batch.items) == 2


def looks_for_gpus(configured: Settings) -> bool:
    """Whether a worker asks which GPUs there are."""
    asked: list[object] = []

    def detect(visible: str | None) -> Detected:
        asked.append(visible)
        return Detected(reason="there is none")

    Devices(configured, redis.Redis(), "w", environ={}, detect=detect, uses_cuda=lambda engine: True).acquire(FLEET)
    return bool(asked)


def told_vllm(name: str, configured: Settings) -> bool:
    """Whether vLLM is given this argument, and it is not false."""
    spec = ModelSpec(name="m", path="a/b")
    return bool(engine_arguments(spec, configured.optimization.vllm, True, Path("/run"))[0].get(name))


FEATURES: Mapping[str, Callable[[Settings], bool]] = MappingProxyType(
    {
        **{f"{engine}.enabled": partial(may_serve, engine) for engine in FLEET},
        "batcher.enabled": runs_together,
        "devices.enabled": looks_for_gpus,
        "vllm.enable_prefix_caching": partial(told_vllm, "enable_prefix_caching"),
    }
)
"""What shows from outside that a feature of ``optimization`` is on."""


# Feature: advanced-optimization-monitoring, Property 52: each feature can be switched on and off
@EXAMPLES
@given(
    in_file=st.dictionaries(st.sampled_from(sorted(FEATURES)), st.booleans()),
    in_environment=st.dictionaries(st.sampled_from(sorted(FEATURES)), st.booleans()),
)
def test_each_feature_is_on_exactly_where_it_is_configured_so(folder: Path, in_file, in_environment) -> None:
    """In the file or in the environment, by itself and in any company; what is not named is on."""
    tree: dict[str, dict[str, bool]] = {}
    for name, value in in_file.items():
        section, _, key = name.partition(".")
        tree.setdefault(section, {})[key] = value
    (folder / "fleet.yaml").write_text(yaml.safe_dump({"optimization": tree}), encoding="utf-8")
    variables = {f"MUAI_OPT_{name.upper().replace('.', '_')}": str(value) for name, value in in_environment.items()}

    configured = load_settings(folder / "fleet.yaml", variables)

    wanted = {name: {**in_file, **in_environment}.get(name, True) for name in FEATURES}
    if not any(wanted[f"{engine}.enabled"] for engine in FLEET):
        wanted["devices.enabled"] = False  # nothing needs one
    assert {name: is_on(configured) for name, is_on in FEATURES.items()} == wanted
