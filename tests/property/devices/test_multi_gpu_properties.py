"""Models over several GPUs: which they get, how they are cut, and when a GPU counts as failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from shared.contract import EngineName
from shared.settings import ModelSpec, OptimizationSettings
from workers.devices.demand import candidates_of, demand_of, too_few, visible_devices
from workers.devices.monitor import APPLICATION_XIDS, CUDA_ERROR_WINDOW, Failure, HealthPolicy
from workers.devices.nvml import Gpu, Reading
from workers.engines.deepspeed.stage import Place, cut, shares
from workers.engines.vllm.options import engine_arguments

pytestmark = pytest.mark.property
EXAMPLES = settings(max_examples=100, deadline=None, derandomize=True)

PARALLEL = st.integers(1, 4)
GPUS = st.lists(st.tuples(st.booleans(), st.integers(0, 80), st.integers(0, 100)), max_size=12).map(
    lambda rows: [
        Gpu(index, f"GPU-{index}", memory_used_bytes=used, utilization_percent=busy, healthy=well)
        for index, (well, used, busy) in enumerate(rows)
    ]
)


def optimization(engine: EngineName, tensor: int, pipeline: int) -> OptimizationSettings:
    """Settings with this engine's model over ``tensor * pipeline`` GPUs."""
    names = {
        EngineName.VLLM: ("tensor_parallel_size", "pipeline_parallel_size"),
        EngineName.DEEPSPEED: ("tensor_parallel", "pipeline_parallel"),
    }[engine]
    return OptimizationSettings.model_validate({engine: dict(zip(names, (tensor, pipeline), strict=True))})


def ranks_of(engine: EngineName, configured: OptimizationSettings) -> int:
    """How many processes, each with a GPU of its own, the engine itself starts."""
    if engine is EngineName.DEEPSPEED:
        return Place(0, configured.deepspeed.tensor_parallel, configured.deepspeed.pipeline_parallel).world
    told, _ = engine_arguments(ModelSpec(name="m", path="a/b"), configured.vllm, False, Path("/run"))
    return told["tensor_parallel_size"] * told["pipeline_parallel_size"]


def confined(engine: EngineName, configured: OptimizationSettings, gpus: list[Gpu]) -> list[Gpu] | None:
    """The GPUs that a worker on this machine would see; ``None`` where it has too few that are well."""
    demand = demand_of(configured, [engine])
    found = candidates_of(demand, gpus)
    assert bool(too_few(demand, gpus)) == (demand.count > len(gpus))
    if len(found) < demand.count:
        return None
    variables = visible_devices(demand, gpus, [gpu.uuid for gpu in found[: demand.count]])
    seen = variables["CUDA_VISIBLE_DEVICES"].split(",")
    return [gpu for name in seen for gpu in gpus if name in (gpu.uuid, str(gpu.index))]


# Feature: advanced-optimization-monitoring, Property 40: layers can be shared by several GPUs
@EXAMPLES
@given(engine=st.sampled_from([EngineName.VLLM, EngineName.DEEPSPEED]), tensor=PARALLEL, gpus=GPUS)
def test_a_tensor_parallel_model_sees_a_gpu_for_each_of_its_parts(engine, tensor: int, gpus: list[Gpu]) -> None:
    """On any machine: as many different, healthy ones as it has processes; none where there are not that many."""
    configured = optimization(engine, tensor, 1)

    seen = confined(engine, configured, gpus)

    well = [gpu for gpu in gpus if gpu.healthy]
    assert (seen is not None) == (len(well) >= tensor)
    if seen is not None:
        assert len(set(seen)) == len(seen) == ranks_of(engine, configured) == tensor
        assert set(seen) <= set(well)


# Feature: advanced-optimization-monitoring, Property 41: stages can lie on several GPUs
@EXAMPLES
@given(engine=st.sampled_from([EngineName.VLLM, EngineName.DEEPSPEED]), tensor=PARALLEL, pipeline=PARALLEL, gpus=GPUS)
def test_a_pipeline_has_a_gpu_for_each_part_of_each_stage(engine, tensor: int, pipeline: int, gpus) -> None:
    """Every rank is one part of one stage, on a GPU that no other rank has; one of them reads, one has the scores."""
    configured = optimization(engine, tensor, pipeline)

    seen = confined(engine, configured, gpus)

    places = [Place(rank, tensor, pipeline) for rank in range(tensor * pipeline)]
    assert Counter(place.stage for place in places) == dict.fromkeys(range(pipeline), tensor)
    assert sum(place.answers for place in places) == 1
    assert all(place.first == (place.stage == 0) and place.last == (place.stage == pipeline - 1) for place in places)
    if seen is not None:
        assert len(set(seen)) == len(seen) == ranks_of(engine, configured) == len(places)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Such small models are run by one thread fastest."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def small(kind: str, layers: int) -> Any:
    """A decoder with random weights."""
    sizes = {"vocab_size": 40, "max_position_embeddings": 32, "bos_token_id": None, "eos_token_id": 0}
    torch.manual_seed(layers)
    model: Any
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=2, n_layer=layers, **sizes))
    else:
        model = LlamaForCausalLM(
            LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=layers, **sizes)
        )
    return model.eval()


# Feature: advanced-optimization-monitoring, Property 41: stages can lie on several GPUs
@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["gpt2", "llama"]),
    cuts=st.integers(1, 5).flatmap(lambda layers: st.tuples(st.just(layers), st.integers(1, layers))),
    ids=st.lists(st.integers(1, 39), min_size=1, max_size=12),
)
def test_the_stages_one_after_the_other_are_the_whole_model(one_thread, kind: str, cuts, ids: list[int]) -> None:
    """However many layers and stages: what leaves the last stage is what the model in one piece says."""
    layers, stages = cuts
    whole = small(kind, layers)
    entry = {"input_ids": torch.tensor([ids])}
    with torch.inference_mode():
        wanted = whole(**entry).logits[:, -1]
        place = torch.arange(len(ids))[None]
        for stage in range(stages):
            part = deepcopy(whole)
            cut(part, Place(stage, 1, stages))
            states = part.base_model(**entry, position_ids=place).last_hidden_state
            entry = {"inputs_embeds": states}
        found = part.lm_head(states[:, -1])

    torch.testing.assert_close(found, wanted)


# Feature: advanced-optimization-monitoring, Property 42: GPUs are loaded evenly
@EXAMPLES
@given(layers=st.integers(1, 200), stages=st.integers(1, 16))
def test_stages_have_equal_shares_of_the_layers(layers: int, stages: int) -> None:
    """Each layer is in one stage, in order; no stage has more than one above another, and the last one no more."""
    cut_up = shares(layers, stages)

    assert [layer for share in cut_up for layer in share] == list(range(layers))
    sizes = [len(share) for share in cut_up]
    assert len(sizes) == stages
    assert max(sizes) - min(sizes) <= 1
    assert sizes[-1] == min(sizes)


# Feature: advanced-optimization-monitoring, Property 42: GPUs are loaded evenly
@EXAMPLES
@given(gpus=GPUS, tensors=st.lists(PARALLEL, min_size=1, max_size=4))
def test_workers_that_come_one_after_the_other_take_the_least_loaded_gpus(gpus: list[Gpu], tensors: list[int]) -> None:
    """Whatever a worker takes is used no more than anything it leaves."""
    free = list(gpus)
    for tensor in tensors:
        seen = confined(EngineName.DEEPSPEED, optimization(EngineName.DEEPSPEED, tensor, 1), free)
        if seen is None:
            continue
        free = [gpu for gpu in free if gpu not in seen]
        left = [gpu.load for gpu in free if gpu.healthy]
        assert max(gpu.load for gpu in seen) <= min(left, default=max(gpu.load for gpu in seen))


HELD = ("GPU-a", "GPU-b", "GPU-c")
SOUND = st.builds(
    Reading,
    uuid=st.sampled_from(HELD),
    uncorrected_ecc=st.none() | st.just(7),
    xids=st.lists(st.sampled_from(sorted(APPLICATION_XIDS)), max_size=3).map(tuple),
)
FAULTS = st.builds(Reading, uuid=st.just(""), problem=st.just("GPU is lost")) | st.builds(
    Reading, uuid=st.just(""), xids=st.lists(st.sampled_from([48, 79, 94, 13]), min_size=1).map(lambda x: (*x, 79))
)


def fault(uuid: str, sign: Reading) -> Reading:
    """The sign of a failure, of this GPU."""
    return Reading(uuid, sign.problem, sign.uncorrected_ecc, sign.xids)


# Feature: advanced-optimization-monitoring, Property 43: a GPU that fails is noticed
@EXAMPLES
@given(
    calm=st.lists(st.lists(SOUND, max_size=4), max_size=6),
    failing=st.dictionaries(st.sampled_from(HELD), FAULTS | st.integers(1, 50), min_size=1),
)
def test_a_failure_is_noticed_at_the_first_look_and_nothing_else_is(calm, failing) -> None:
    """Old memory errors and a program's own faults are none; then exactly the GPUs that failed are named, with why."""
    policy = HealthPolicy(HELD, max_cuda_errors=3)
    policy.judge([Reading(uuid, uncorrected_ecc=7) for uuid in HELD])
    for readings in calm:
        assert policy.judge(readings) is None
    now = [
        Reading(uuid, uncorrected_ecc=7 + sign) if isinstance(sign, int) else fault(uuid, sign)
        for uuid, sign in failing.items()
    ]
    now += [Reading(uuid, uncorrected_ecc=7) for uuid in HELD if uuid not in failing]

    found = policy.judge(now)

    assert found is not None
    assert set(found.gpus) == failing.keys()
    signs = {"lost": "GPU is lost", "xid": "Xid", "ecc": "memory errors rose"}
    for sign in failing.values():
        kind = "ecc" if isinstance(sign, int) else "lost" if sign.problem else "xid"
        assert signs[kind] in found.reason


# Feature: advanced-optimization-monitoring, Property 43: a GPU that fails is noticed
@EXAMPLES
@given(most=st.integers(1, 5), gaps=st.lists(st.floats(0, 40), min_size=1, max_size=20))
def test_cuda_errors_are_a_failure_once_enough_of_them_fall_into_one_minute(most: int, gaps: list[float]) -> None:
    """Exactly when, counted anew at each error; all held GPUs are named, for nobody knows which it was."""
    policy = HealthPolicy(HELD, max_cuda_errors=most)
    times: list[float] = []
    for gap in gaps:
        times.append((times[-1] if times else 0.0) + gap)

        found = policy.cuda_error(times[-1])

        recent = [at for at in times if times[-1] - at <= CUDA_ERROR_WINDOW]
        assert isinstance(found, Failure) == (len(recent) >= most)
        assert found is None or found.gpus == HELD
