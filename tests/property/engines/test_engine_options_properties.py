"""Each engine is run as it was configured: what its library is told follows from the settings, for any of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.contract import EngineName
from shared.errors import EngineLoadError
from shared.settings import DeepSpeedSettings, ModelSpec, PyTorchSettings, Settings, VLLMSettings
from workers.engines.deepspeed import engine as deepspeed
from workers.engines.onnx.session import CPU, CUDA, OPENVINO, TENSORRT, open_session
from workers.engines.pytorch.compiler import ModelCompiler
from workers.engines.pytorch.model import torch_dtype
from workers.engines.vllm.options import engine_arguments

pytestmark = pytest.mark.property
EXAMPLES = settings(max_examples=100, deadline=None, derandomize=True)

DTYPES = {
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float32": torch.float32,
    "fp32": torch.float32,
    "auto": torch.float32,
}
"""What each spelling means on a CPU."""
LENGTHS = st.none() | st.integers(1, 4096)
PARALLEL = st.integers(1, 8)


# Feature: advanced-optimization-monitoring, Property 3: an engine is run as it was configured
@EXAMPLES
@given(
    configured=st.builds(
        VLLMSettings,
        tensor_parallel_size=PARALLEL,
        pipeline_parallel_size=PARALLEL,
        dtype=st.sampled_from(list(DTYPES)),
        max_model_len=LENGTHS,
        gpu_memory_utilization=st.floats(0, 1),
        max_num_seqs=st.integers(1, 512),
        enable_prefix_caching=st.booleans(),
        engine_args=st.dictionaries(st.sampled_from(["seed", "max_num_seqs"]), st.integers(1, 9)),
    ),
    longest=LENGTHS,
    own=st.dictionaries(st.sampled_from(["seed", "tensor_parallel_size"]), st.integers(1, 9)),
    on_cpu=st.booleans(),
)
def test_vllm_is_told_its_parallelism_number_format_and_limits(configured, longest, own, on_cpu) -> None:
    """The settings, then ``engine_args``, then the model's own options; the shorter of two lengths."""
    spec = ModelSpec(name="m", path="a/b", max_length=longest, options={EngineName.VLLM: own})

    told, _ = engine_arguments(spec, configured, on_cpu, Path("/run"))

    wanted = {
        "tensor_parallel_size": configured.tensor_parallel_size,
        "pipeline_parallel_size": configured.pipeline_parallel_size,
        "gpu_memory_utilization": configured.gpu_memory_utilization,
        "max_num_seqs": configured.max_num_seqs,
        "enable_prefix_caching": configured.enable_prefix_caching,
        **configured.engine_args,
        **own,
    }
    assert {name: told[name] for name in wanted} == wanted
    as_is = configured.dtype == "auto" and not on_cpu
    assert told["dtype"] == ("auto" if as_is else str(DTYPES[configured.dtype]).removeprefix("torch."))
    lengths = [length for length in (configured.max_model_len, longest) if length]
    assert told.get("max_model_len") == (min(lengths) if lengths else None)


class Started(Exception):
    """What the processes of a model would have been started with."""

    def __init__(self, name: str, world: int, plan: dict[str, Any], timeout: float) -> None:
        super().__init__(name)
        self.world = world
        self.told = json.loads(json.dumps(plan))  # it goes to them as JSON
        self.timeout = timeout


def starting(*arguments: Any) -> None:
    """In the place of processes."""
    raise Started(*arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a model's files are."""
    return tmp_path_factory.mktemp("model")


# Feature: advanced-optimization-monitoring, Property 3: an engine is run as it was configured
@EXAMPLES
@given(
    configured=st.builds(
        DeepSpeedSettings,
        tensor_parallel=PARALLEL,
        pipeline_parallel=PARALLEL,
        dtype=st.sampled_from(list(DTYPES)),
        replace_with_kernel_inject=st.booleans(),
        rank_timeout_seconds=st.floats(1, 1000),
    ),
    own=st.dictionaries(st.sampled_from(["tensor_parallel", "pipeline_parallel"]), PARALLEL),
    heads=st.sampled_from([1, 2, 4, 6, 8, 12]),
    layers=st.integers(1, 8),
)
def test_deepspeeds_processes_are_told_what_is_configured(folder: Path, configured, own, heads, layers) -> None:
    """A process for each part, told the settings with the model's own over them; none where it cannot be cut so."""
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": heads, "num_hidden_layers": layers}))
    spec = ModelSpec(name="m", path=str(folder), options={EngineName.DEEPSPEED: own})
    engine = deepspeed.DeepSpeedEngine(Settings.model_validate({"optimization": {"deepspeed": configured}}))
    wanted = configured.model_copy(update=own)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed, "RankGroup", starting)
        with pytest.raises((Started, EngineLoadError)) as caught:
            engine.load(spec)

    fits = heads % wanted.tensor_parallel == 0 and wanted.pipeline_parallel <= layers
    assert isinstance(caught.value, Started) == fits
    if isinstance(caught.value, Started):
        assert caught.value.world == wanted.tensor_parallel * wanted.pipeline_parallel
        assert DeepSpeedSettings.model_validate(caught.value.told["settings"]) == wanted
        assert caught.value.timeout == wanted.rank_timeout_seconds


PROVIDERS = st.lists(st.sampled_from([CUDA, TENSORRT, OPENVINO, CPU]), min_size=1, unique=True)


# Feature: advanced-optimization-monitoring, Property 3: an engine is run as it was configured
@EXAMPLES
@given(
    providers=PROVIDERS,
    installed=PROVIDERS,
    broken=st.sets(st.sampled_from([CUDA, TENSORRT, OPENVINO])),
    level=st.sampled_from(["none", "basic", "extended", "all"]),
    threads=st.integers(0, 3),
    spin=st.booleans(),
)
def test_onnx_runtime_is_told_its_providers_and_options(
    folder: Path, providers, installed, broken, level, threads, spin
) -> None:
    """Those that are installed, in the configured order, from the first that starts; or the model does not load."""
    spec = ModelSpec(name="m", path="m", options={EngineName.ONNX: {"intra_op_threads": threads, "spin": spin}})
    onnx = {"execution_providers": providers, "optimization_level": level}
    configured = Settings.model_validate({"optimization": {"onnx": onnx}, "models": {"cache_dir": str(folder)}})
    ran: list[tuple[list[str], onnxruntime.SessionOptions]] = []

    class Session:
        """In the place of ONNX Runtime's own, which needs the hardware."""

        def __init__(
            self, graph: str, options: onnxruntime.SessionOptions, providers: list[tuple[str, object]]
        ) -> None:
            self.names = [name for name, _ in providers]
            if self.names[0] in broken:
                raise RuntimeError("its library is not there")
            ran.append((self.names, options))

        def get_providers(self) -> list[str]:
            return self.names

    usable = [name for name in providers if name in installed]
    while usable and usable[0] in broken:
        usable = usable[1:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "get_available_providers", lambda: installed)
        patch.setattr(onnxruntime, "InferenceSession", Session)
        if not usable:
            with pytest.raises(EngineLoadError, match="none of the execution providers|cannot open 'm' with"):
                open_session(folder / "g.onnx", configured, spec)
            return
        open_session(folder / "g.onnx", configured, spec)

    ((names, options),) = ran
    levels = {"none": "DISABLE_ALL", "basic": "ENABLE_BASIC", "extended": "ENABLE_EXTENDED", "all": "ENABLE_ALL"}
    assert names == usable
    assert options.graph_optimization_level.name == f"ORT_{levels[level]}"
    assert options.intra_op_num_threads == threads
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == str(int(spin))


# Feature: advanced-optimization-monitoring, Property 3: an engine is run as it was configured
@EXAMPLES
@given(
    configured=st.builds(
        PyTorchSettings,
        dtype=st.sampled_from(list(DTYPES)),
        compile_mode=st.sampled_from(["default", "reduce-overhead", "max-autotune"]),
        compile_dynamic=st.none() | st.booleans(),
    ),
    load=st.none() | st.floats(0, 1),
)
def test_pytorch_is_told_its_number_format_and_how_to_compile(configured: PyTorchSettings, load) -> None:
    """The format in any spelling; the mode as configured, or by the load where that is known."""
    told: dict[str, Any] = {}

    def compiling(model: object, **options: Any) -> object:
        told.update(options)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", compiling)
        ModelCompiler(configured).compile_model(torch.nn.Identity(), "m", load)

    mode = configured.compile_mode
    if load is not None and load > configured.compile_load_high:
        mode = "max-autotune"
    elif load is not None and load < configured.compile_load_low:
        mode = "default"
    assert torch_dtype(configured.dtype, torch.device("cpu")) == DTYPES[configured.dtype]
    assert (told["mode"], told["dynamic"]) == (mode, configured.compile_dynamic)
