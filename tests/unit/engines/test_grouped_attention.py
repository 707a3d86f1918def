"""Attention over shared key-value heads: the same as transformers' own, and used where it pays."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from workers.engines.common.grouped_attention import NAME, group_heads


def llama(shared: int) -> LlamaForCausalLM:
    """A tiny model with four query heads over ``shared`` key-value heads."""
    torch.manual_seed(1)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=shared,
        )
    ).eval()  # fmt: skip


def test_a_step_over_shared_heads_is_that_of_transformers():
    """Padded rows, a prompt and two steps: the scores differ by rounding at most."""
    model = llama(2)
    ids = torch.randint(0, 50, (3, 7))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    runs = []
    for _ in range(2):
        shown, cache, tokens, scores = mask, None, ids, []
        for _ in range(3):
            out = model(input_ids=tokens, attention_mask=shown, past_key_values=cache, use_cache=True)
            cache, tokens = out.past_key_values, out.logits[:, -1:].argmax(-1)
            shown = torch.cat([shown, shown.new_ones(3, 1)], 1)
            scores.append(out.logits[:, -1])
        runs.append(torch.stack(scores))
        group_heads(model, torch.device("cpu"))

    assert model.config._attn_implementation == NAME
    assert (runs[0] - runs[1]).abs().max() < 1e-6


def test_a_model_without_shared_heads_is_left_alone():
    """There is nothing to gain."""
    model = llama(4)
    group_heads(model, torch.device("cpu"))
    assert model.config._attn_implementation == "sdpa"
