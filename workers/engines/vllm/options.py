"""What vLLM is told: its engine arguments and what it reads from the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shared.contract import EngineName, Kind
from shared.errors import EngineLoadError
from shared.settings import ModelSpec, VLLMSettings
from workers.engines.common.roles import GENERATING

POOLING = frozenset({Kind.EMBED})

_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
_POOLING = {"mean": "MEAN", "cls": "CLS", "last": "LAST"}


def engine_arguments(
    spec: ModelSpec, settings: VLLMSettings, on_cpu: bool, folder: Path
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What vLLM's ``AsyncEngineArgs`` is given for a model, and what an operator should know of it.

    The sockets at which KV events are published and replayed are in ``folder``.
    """
    kinds = set(spec.kinds)
    notes = []
    path = Path(spec.path).expanduser()
    dtype = _DTYPES.get(settings.dtype, settings.dtype)
    limits = [limit for limit in (settings.max_model_len, spec.max_length) if limit]
    arguments: dict[str, Any] = {
        "model": str(path) if path.exists() else spec.path,
        "trust_remote_code": spec.trust_remote_code,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "pipeline_parallel_size": settings.pipeline_parallel_size,
        "dtype": "float32" if dtype == "auto" and on_cpu else dtype,
        "max_num_seqs": settings.max_num_seqs,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "disable_log_stats": False,  # vLLM counts for Prometheus; its own lines in the log are below its level
    }
    if limits:
        arguments["max_model_len"] = min(limits)
    if kinds & GENERATING:
        arguments["runner"] = "generate"
        arguments["enable_prefix_caching"] = settings.enable_prefix_caching
        arguments["scheduling_policy"] = "priority"
        if settings.kv_events and settings.enable_prefix_caching:
            events, replay = (f"ipc://{folder / name}" for name in ("kv-events", "kv-replay"))
            arguments["kv_events_config"] = {
                "enable_kv_cache_events": True, "publisher": "zmq", "endpoint": events,
                "replay_endpoint": replay,
            }  # fmt: skip
            notes.append(f"KV events at {events}")
    elif kinds & POOLING:
        arguments["runner"] = "pooling"
        arguments["pooler_config"] = {"pooling_type": _POOLING[spec.pooling], "use_activation": spec.normalize}
    else:
        raise EngineLoadError(
            f"the vllm engine answers none of {', '.join(spec.kinds)} with {spec.name!r}; it serves: "
            f"{', '.join(sorted(GENERATING | POOLING))}"
        )
    if on_cpu:
        arguments["enforce_eager"] = True  # compiling needs minutes and a C++ compiler
    elif "swap_space" in settings.model_fields_set and settings.swap_space:
        arguments["kv_offloading_size"] = float(settings.swap_space)
    return {**arguments, **settings.engine_args, **spec.options.get(EngineName.VLLM, {})}, tuple(notes)


def prepare_environment(settings: VLLMSettings, on_cpu: bool) -> None:
    """What vLLM reads from the environment, where the operator has not set it."""
    wanted = {
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork would carry the broker's connections into the core
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if on_cpu:
        wanted["VLLM_CPU_KVCACHE_SPACE"] = str(settings.kv_cache_gb)
        ranks = settings.tensor_parallel_size * settings.pipeline_parallel_size
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        if ranks > 1 and len(cores) >= ranks:
            share = len(cores) // ranks
            wanted["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(
                ",".join(map(str, cores[rank * share : (rank + 1) * share])) for rank in range(ranks)
            )
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


def on_cuda() -> bool:
    """Whether there is a GPU to run on."""
    import torch

    return bool(torch.cuda.is_available())


@contextmanager
def temporary_files_in(folder: Path) -> Iterator[None]:
    """What an engine core that starts meanwhile leaves on the disk (sockets, rendezvous files) lies in ``folder``."""
    names = ("TMPDIR", "VLLM_RPC_BASE_PATH")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, str(folder)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
