"""Tiny models with random weights, made on the spot: real architectures, no download."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from demo.train import make_tokenizer

CONTEXT = 256
SPREAD = 0.15
"""Standard deviation of the weights: wide enough that the next token is seldom a near tie."""


def make_llama(directory: Path, **sizes: int) -> Path:
    """A Llama of about 0.2 million parameters, or of other sizes."""
    return _save(directory, lambda ids: LlamaForCausalLM(LlamaConfig(**{**_decoder(), **sizes}, **ids)))


def make_qwen(directory: Path) -> Path:
    """A Qwen2 of about 0.5 million parameters: biases in the attention, another rotary base."""
    sizes = {**_decoder(), "hidden_size": 128, "rope_theta": 1e6}  # its heads are 32 wide, as in the others
    del sizes["head_dim"]
    return _save(directory, lambda ids: Qwen2ForCausalLM(Qwen2Config(**sizes, **ids)))


def make_gpt2(directory: Path) -> Path:
    """A GPT-2 of about 0.7 million parameters: learned positions, layer norms, no rotary embedding, no shared heads."""
    sizes = {"n_positions": CONTEXT, "n_embd": 128, "n_layer": 3, "n_head": 4}
    return _save(directory, lambda ids: GPT2LMHeadModel(GPT2Config(**sizes, **ids)))


def make_bert(directory: Path) -> Path:
    """A BERT-like encoder of about 0.1 million parameters."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
    return _save(
        directory,
        lambda ids: BertModel(
            BertConfig(
                vocab_size=ids["vocab_size"], pad_token_id=ids["pad_token_id"], max_position_embeddings=CONTEXT, **sizes
            )
        ),
    )  # fmt: skip


def greedy_reference(path: Path, prompts: list[str], max_tokens: int) -> list[list[int]]:
    """Greedy tokens of transformers.generate of each prompt alone, without the end token.

    It takes a while, so the answers of the same weights to the same prompts are kept for other test modules.
    """
    weights = hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
    key = (weights, tuple(prompts), max_tokens)
    if key not in _references:
        _references[key] = _greedy(path, prompts, max_tokens)
    return _references[key]


_references: dict[tuple[str, tuple[str, ...], int], list[list[int]]] = {}


def _greedy(path: Path, prompts: list[str], max_tokens: int) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        full = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_tokens)
        rows.append([token for token in full[0, ids.shape[1] :].tolist() if token != tokenizer.eos_token_id])
    return rows


def mean_vectors(path: Path, texts: list[str]) -> NDArray[np.float32]:
    """Mean of the last hidden states of each text alone, by transformers itself; shape (texts, size)."""
    model = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    with torch.inference_mode():
        return np.stack(
            [
                model(tokenizer(text, return_tensors="pt")["input_ids"]).last_hidden_state[0].mean(0).numpy()
                for text in texts
            ]
        )


def _decoder() -> dict[str, Any]:
    return {
        "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": CONTEXT,
    }  # fmt: skip


def _save(directory: Path, build: Callable[[dict[str, Any]], PreTrainedModel]) -> Path:
    torch.manual_seed(11)
    tokenizer = make_tokenizer()
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    model = build({"vocab_size": len(tokenizer), **ids})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, SPREAD)
    model.eval()
    if getattr(model, "generation_config", None) is not None:
        model.generation_config = GenerationConfig(eos_token_id=ids["eos_token_id"], pad_token_id=ids["pad_token_id"])
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
