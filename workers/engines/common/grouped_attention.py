"""Attention of models whose query heads share key-value heads, without a copy of the cache for each query head.

transformers repeats the shared heads before it calls torch's attention with a mask, in every layer and every step. On a
CPU torch needs no such copy; on a GPU its fast kernels do, so there transformers' own way is left as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_grouped"


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **named: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over (rows, heads, tokens, size); only a single step is other than transformers' own.

    Many queries outweigh the copy, and are not faster without it.
    """
    shared = getattr(module, "num_key_value_groups", 1) > 1
    if not shared or query.shape[2] > 1 or dropout or named.get("position_bias") is not None:
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **named
        )
        return found
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def group_heads(model: Any, device: torch.device) -> None:
    """Let a model on the CPU use this attention, where it has shared heads and torch's attention already."""
    config = model.config
    heads = getattr(config, "num_attention_heads", None)
    shared = getattr(config, "num_key_value_heads", None)
    if device.type == "cpu" and heads and shared and shared < heads and config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)
