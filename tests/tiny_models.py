"""Small models with random weights, made on the spot: a Llama, a Qwen2, a Qwen3 and a BERT, each with a tokenizer.

They are the real architectures at a size that loads and runs in milliseconds. The same arguments give the same weights,
so that what they generate is stable; their text means nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CONTEXT = 256
"""Longest sequence of the decoders, in tokens."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}\n"
    "<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_MERGES = "th he in er an re on at en nd st ing the and tion hello world ab abc".split()
_DECODERS: dict[str, tuple[type[Any], type[Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def make_decoder(
    folder: Path, architecture: str = "llama", *, seed: int = 0, chat: bool = True, context: int = CONTEXT, **config: Any
) -> Path:
    """Write a decoder-only model of about 0.2 M parameters into ``folder`` and return it.

    ``architecture`` is ``llama``, ``qwen2`` or ``qwen3``; ``config`` overrides fields of its configuration (a larger
    ``hidden_size`` or ``num_hidden_layers``, say).
    """
    tokenizer = _tokenizer(("<s>", "</s>", "<pad>"), bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    config_class, model_class = _DECODERS[architecture]
    fields: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        "initializer_range": 0.15,  # wide enough that the next token depends on what came before
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if architecture == "qwen3":
        fields["head_dim"] = 16
    _write(folder, tokenizer, model_class, config_class(**fields | config), seed)
    return folder


def make_encoder(folder: Path, *, seed: int = 0, context: int = 128, **config: Any) -> Path:
    """Write a BERT of about 0.2 M parameters into ``folder`` and return it."""
    tokenizer = _tokenizer(
        ("[PAD]", "[CLS]", "[SEP]", "[UNK]"),
        pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]", model_max_length=context,
    )  # fmt: skip
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", tokenizer.cls_token_id), ("[SEP]", tokenizer.sep_token_id)],
    )
    fields: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": context,
        "initializer_range": 0.15,
        "pad_token_id": tokenizer.pad_token_id,
    }
    _write(folder, tokenizer, BertModel, BertConfig(**fields | config), seed)
    return folder


def _write(folder: Path, tokenizer: PreTrainedTokenizerFast, model_class: type[Any], config: Any, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer(special: tuple[str, ...], **roles: Any) -> PreTrainedTokenizerFast:
    """Bytes, and a few longer tokens made of them, so that a word can be one token or many."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    for word in _MERGES:
        _add_word(word, vocabulary, merges)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


def _add_word(word: str, vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> None:
    """Add a token for ``word``, built from the longest tokens already there."""
    left = word[0]
    while left != word:
        rest = word[len(left) :]
        right = next(rest[:size] for size in range(len(rest), 0, -1) if rest[:size] in vocabulary)
        if left + right not in vocabulary:
            merges.append((left, right))
            vocabulary[left + right] = len(vocabulary)
        left += right
