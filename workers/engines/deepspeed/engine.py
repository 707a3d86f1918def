"""The DeepSpeed engine: a model held by one process, or cut over several by tensor and pipeline parallelism.

What runs in the worker (this module, ``model`` and ``group``) imports neither torch nor DeepSpeed; the processes that
it starts do.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ValidationError

from shared.contract import EngineName, Feature, Kind, explain
from shared.errors import ConfigurationError, EngineLoadError, EngineOutOfMemory
from shared.settings import DeepSpeedSettings, ModelSpec, Settings
from workers.engines.base import Availability, Engine
from workers.engines.common.text import first_line, require_path
from workers.engines.deepspeed.group import RankGroup
from workers.engines.deepspeed.model import DeepSpeedModel

logger = logging.getLogger(__name__)

CUT = frozenset({Kind.GENERATE, Kind.CHAT, Kind.EMBED})
"""What a model that is cut over several processes answers; one in one piece answers everything."""


class DeepSpeedEngine(Engine):
    """Starts rank groups. The settings of ``optimization.deepspeed`` may be overridden in a model's options."""

    name = EngineName.DEEPSPEED
    features: ClassVar[frozenset[Feature]] = frozenset({Feature.LOGPROBS})

    @classmethod
    def availability(cls, settings: Settings) -> Availability:
        """Whether deepspeed, torch and transformers are installed."""
        missing = [package for package in ("torch", "transformers", "deepspeed") if find_spec(package) is None]
        if missing:
            reason = f"{', '.join(missing)} not installed"
            return Availability(False, reason, 'pip install "muai-fleet[deepspeed]"')
        return Availability(True)

    def load(self, spec: ModelSpec) -> DeepSpeedModel:
        """Start the processes and wait until the model is in their memory.

        Raises :class:`ConfigurationError` and :class:`EngineLoadError`; what does not fit the model is found before
        anything is started.
        """
        require_path(spec)
        configured = self._configured(spec)
        check(spec, configured, model_config(spec))
        world = configured.tensor_parallel * configured.pipeline_parallel
        plan = {"spec": spec.model_dump(mode="json"), "settings": configured.model_dump(mode="json")}
        group = RankGroup(spec.name, world, plan, configured.rank_timeout_seconds)
        try:
            loaded = group.loaded()
        except BaseException as error:
            group.close()
            if isinstance(error, EngineOutOfMemory):
                raise EngineLoadError(f"{spec.name!r} does not fit the memory: {error}") from error
            raise
        for note in loaded["notes"]:
            logger.info("deepspeed: %s", note)
        return DeepSpeedModel(spec, group, loaded)

    def _configured(self, spec: ModelSpec) -> DeepSpeedSettings:
        options = spec.options.get(EngineName.DEEPSPEED, {})
        try:
            return DeepSpeedSettings.model_validate(
                {**self.settings.optimization.deepspeed.model_dump(), **options},
            )
        except ValidationError as error:
            where = f"models.catalog.{spec.name}.options.deepspeed"
            raise ConfigurationError(explain(error, where)) from None


def model_config(spec: ModelSpec) -> dict[str, Any]:
    """The model's ``config.json``, without transformers: that would import torch into the worker."""
    try:
        folder = Path(spec.path).expanduser()
        if folder.is_dir():
            file = folder / "config.json"
        else:
            from huggingface_hub import hf_hub_download

            file = Path(hf_hub_download(spec.path, "config.json"))
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, ImportError) as error:
        raise EngineLoadError(
            f"no config.json of {spec.name!r} can be read at {spec.path!r}: {first_line(error)}"
        ) from error
    return config if isinstance(config, dict) else {}


def check(spec: ModelSpec, configured: DeepSpeedSettings, config: Mapping[str, Any]) -> None:
    """Raise :class:`EngineLoadError` or :class:`ConfigurationError` where the model cannot be held as configured."""
    tensor, pipeline = configured.tensor_parallel, configured.pipeline_parallel
    if tensor * pipeline > 1 and not set(spec.kinds) <= CUT:
        raise EngineLoadError(
            f"model {spec.name!r} is declared for {', '.join(spec.kinds)}; over several processes this engine serves "
            f"{', '.join(sorted(CUT))}"
        )
    if configured.zero_offload != "none" and tensor * pipeline > 1:
        raise ConfigurationError(
            f"zero_offload={configured.zero_offload} is for a model on one GPU: set tensor_parallel and "
            "pipeline_parallel to 1, or zero_offload to none"
        )
    if pipeline > 1 and not {Kind.GENERATE, Kind.CHAT} & set(spec.kinds):
        raise EngineLoadError(
            f"pipeline_parallel={pipeline} is for models that generate; {spec.name!r} is declared for "
            f"{', '.join(spec.kinds)}"
        )
    layers = _first(config, "num_hidden_layers", "n_layer", "num_layers")
    if layers is not None and layers < pipeline:
        raise EngineLoadError(f"pipeline_parallel={pipeline} is more than the {layers} layers of {spec.name!r}")
    heads = _first(config, "num_attention_heads", "n_head", "num_heads")
    groups = _first(config, "num_key_value_heads") or heads
    for count, what in ((heads, "attention heads"), (groups, "key-value heads")):
        if count is not None and count % tensor:
            raise EngineLoadError(
                f"tensor_parallel={tensor} does not divide the {count} {what} of {spec.name!r}; "
                "set optimization.deepspeed.tensor_parallel to a number that does"
            )


def _first(config: Mapping[str, Any], *names: str) -> int | None:
    return next((value for name in names if isinstance(value := config.get(name), int)), None)
