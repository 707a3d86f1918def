"""The vLLM engine: it starts an engine core for each model, in which requests run side by side.

A :class:`~workers.engines.vllm.model.VLLMModel` talks to its core through vLLM's ``AsyncLLM``, on an event loop in a
thread.
"""

from __future__ import annotations

import tempfile
from dataclasses import fields
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from shutil import rmtree
from typing import Any, ClassVar

from shared.contract import EngineName, Feature
from shared.errors import EngineLoadError, FleetError
from shared.settings import ModelSpec, Settings
from workers.engines.base import Availability, Engine
from workers.engines.common.text import first_line, require_path
from workers.engines.vllm.guard import Guard, children, families
from workers.engines.vllm.loop import EngineLoop
from workers.engines.vllm.model import VLLMModel
from workers.engines.vllm.options import engine_arguments, on_cuda, prepare_environment, temporary_files_in


class VLLMEngine(Engine):
    """Starts engine cores."""

    name = EngineName.VLLM
    features: ClassVar[frozenset[Feature]] = frozenset(Feature)

    @classmethod
    def availability(cls, settings: Settings) -> Availability:
        """Whether vLLM is installed."""
        if find_spec("vllm") is None:
            return Availability(
                False, "vllm not installed", 'pip install "muai-fleet[vllm]" (without a GPU: make setup-engines)'
            )
        return Availability(True)

    @property
    def slots(self) -> int | None:
        """As many as the configuration lets run side by side."""
        return self.settings.optimization.vllm.max_num_seqs

    def load(self, spec: ModelSpec) -> VLLMModel:
        """Start an engine core for the model."""
        require_path(spec)
        settings = self.settings.optimization.vllm
        on_cpu = not on_cuda()
        prepare_environment(settings, on_cpu)
        folder = Path(tempfile.mkdtemp(prefix="muai-vllm-"))
        loop, before = EngineLoop(), children()
        try:
            arguments, notes = engine_arguments(spec, settings, on_cpu, folder)
            with temporary_files_in(folder):
                engine = loop.run(_start_engine(arguments)).result()
        except BaseException as error:
            loop.close()
            rmtree(folder, ignore_errors=True)
            if isinstance(error, FleetError):
                raise
            raise EngineLoadError(
                f"vllm cannot load {spec.name!r}: {type(error).__name__}: {first_line(error)}"
            ) from error
        return VLLMModel(spec, self.settings, engine, loop, Guard(families(children() - before), folder), notes)


async def _start_engine(arguments: dict[str, Any]) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    known = {field.name for field in fields(AsyncEngineArgs)}
    for name in sorted(set(arguments) - known):
        near = get_close_matches(name, known, 1)
        raise EngineLoadError(
            f"vllm has no engine argument named {name!r}" + (f"; did you mean {near[0]}?" if near else "")
        )
    pooler = arguments.get("pooler_config")
    if isinstance(pooler, dict):
        from vllm.config import PoolerConfig

        arguments = {**arguments, "pooler_config": PoolerConfig(**pooler)}
    events = arguments.get("kv_events_config")
    if isinstance(events, dict):
        from vllm.config import KVEventsConfig

        arguments = {**arguments, "kv_events_config": KVEventsConfig(**events)}
    # What is left open is as vLLM's own server has it: a large GPU reads 8,192 tokens in a step, not 2,048.
    return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments), usage_context=UsageContext.OPENAI_API_SERVER)
