"""Pipeline parallelism: a decoder's layers cut into stages, one process (or tensor-parallel group) a stage.

``deepspeed.init_inference`` has no pipeline, and DeepSpeed's ``PipelineModule`` runs training schedules without a
key-value cache. So each stage is the model's own class with its share of the layers, and hidden states go from stage
to stage point to point. The first stage has the embedding, the last one the final norm and the head.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from shared.errors import EngineLoadError

MODEL_TYPES = frozenset({"gpt2", "llama", "mistral", "qwen2", "qwen3"})
"""The architectures whose backbone may be entered with hidden states: nothing but layers lies between the ends."""
UNSENT = 16
"""Hidden states that may be on their way to the next stage; each is kept in memory until it has left."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank stands: ``tensor`` ranks share a stage, ``pipeline`` stages follow each other."""

    rank: int
    tensor: int
    pipeline: int

    @property
    def world(self) -> int:
        """How many ranks there are."""
        return self.tensor * self.pipeline

    @property
    def stage(self) -> int:
        """The stage of this rank."""
        return self.rank // self.tensor

    @property
    def first(self) -> bool:
        """Whether this rank reads tokens."""
        return self.stage == 0

    @property
    def last(self) -> bool:
        """Whether this rank has the scores."""
        return self.stage == self.pipeline - 1

    @property
    def answers(self) -> bool:
        """Whether this rank gives the leader the scores: the first one of the last stage."""
        return self.rank == answering(self.tensor, self.pipeline)


def answering(tensor: int, pipeline: int) -> int:
    """The rank that gives the leader the scores."""
    return tensor * (pipeline - 1)


def shares(layers: int, stages: int) -> list[range]:
    """Which layers each stage has; the earlier ones take what does not divide, for the last one has the head."""
    size, more = divmod(layers, stages)
    out: list[range] = []
    for stage in range(stages):
        start = out[-1].stop if out else 0
        out.append(range(start, start + size + (stage < more)))
    return out


def cut(model: Any, place: Place) -> None:
    """Take from ``model`` what other stages have. Raises :class:`EngineLoadError` where it cannot be cut."""
    config = model.config
    if config.model_type not in MODEL_TYPES:
        raise EngineLoadError(
            f"pipeline_parallel={place.pipeline}: a {config.model_type} model cannot be cut into stages; "
            f"these can: {', '.join(sorted(MODEL_TYPES))}"
        )
    backbone = model.base_model
    gpt2 = config.model_type == "gpt2"
    mine = shares(config.num_hidden_layers, place.pipeline)[place.stage]
    if not mine:
        raise EngineLoadError(f"pipeline_parallel={place.pipeline}: the model has {config.num_hidden_layers} layers")
    kept = torch.nn.ModuleList((backbone.h if gpt2 else backbone.layers)[index] for index in mine)
    setattr(backbone, "h" if gpt2 else "layers", kept)
    for index, layer in enumerate(kept):
        part: Any
        for part in layer.modules():
            if hasattr(part, "layer_idx"):  # the place in the cache, which has this stage's layers only
                part.layer_idx = index
    config.num_hidden_layers = len(mine)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[mine.start : mine.stop]
    if hasattr(backbone, "has_sliding_layers"):
        backbone.has_sliding_layers = "sliding_attention" in config.layer_types
    if not place.first:
        setattr(backbone, "wte" if gpt2 else "embed_tokens", torch.nn.Identity())
        if gpt2:
            backbone.wpe = _NoPositions()
    if not place.last:
        setattr(backbone, "ln_f" if gpt2 else "norm", torch.nn.Identity())
        model.lm_head = torch.nn.Identity()


class StageModel(torch.nn.Module):
    """One stage, called like the whole model. Only the last stage's scores are scores; the others' are zeros."""

    def __init__(self, model: Any, place: Place, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = model
        self.config = model.config
        self.generation_config = model.generation_config
        self._place = place
        self._device = device
        self._dtype = dtype
        self._unsent: deque[tuple[Any, torch.Tensor]] = deque()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: Any,
        use_cache: bool,
    ) -> Any:
        """Ids of shape (rows, length); on all stages but the first only their shape is read."""
        rows, length = input_ids.shape
        if self._place.first:
            entry = {"input_ids": input_ids}
        else:
            size = self.config.hidden_size
            hidden = torch.empty((rows, length, size), dtype=self._dtype, device=self._device)
            dist.recv(hidden, src=self._place.rank - self._place.tensor)
            entry = {"inputs_embeds": hidden}
        out = self.inner.base_model(
            **entry, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
            use_cache=use_cache,
        )  # fmt: skip
        if self._place.last:
            scores = self.inner.lm_head(out.last_hidden_state[:, -1:])
        else:
            self._send(out.last_hidden_state)
            scores = torch.zeros((rows, 1, 1), device=self._device)
        return SimpleNamespace(past_key_values=out.past_key_values, logits=scores)

    def _send(self, hidden: torch.Tensor) -> None:
        """Hand the states to the next stage without waiting for it to take them: it may be at another batch."""
        hidden = hidden.to(self._dtype).contiguous()
        self._unsent.append((dist.isend(hidden, dst=self._place.rank + self._place.tensor), hidden))
        while self._unsent and (len(self._unsent) > UNSENT or self._unsent[0][0].is_completed()):
            self._unsent.popleft()[0].wait()


class _NoPositions(torch.nn.Module):
    """In the place of GPT-2's position embedding where the hidden states have it already."""

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        """A zero, whatever the positions."""
        return torch.zeros((), device=position_ids.device)
