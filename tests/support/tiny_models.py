"""Tiny models with random weights, made on the spot: real architectures, no download."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from demo.train import make_tokenizer

CONTEXT = 256
PREFIX = "summarize: "
SPREAD = 0.15
"""Standard deviation of the weights: wide enough that the next token is seldom a near tie."""


def make_llama(directory: Path, **sizes: int) -> Path:
    """A Llama of about 0.2 million parameters, or of other sizes."""
    return _save(directory, lambda ids: LlamaForCausalLM(LlamaConfig(**{**_decoder(), **sizes}, **ids)))


def make_qwen(directory: Path) -> Path:
    """A Qwen2 of about 0.4 million parameters: biases in the attention, another rotary base."""
    sizes = {**_decoder(), "num_hidden_layers": 2, "hidden_size": 128, "rope_theta": 1e6}
    del sizes["head_dim"]  # its heads are 32 wide, as in the others
    return _save(directory, lambda ids: Qwen2ForCausalLM(Qwen2Config(**sizes, **ids)))


def make_gpt2(directory: Path) -> Path:
    """A GPT-2 of about 0.5 million parameters: learned positions, layer norms, no rotary embedding, no shared heads."""
    sizes = {"n_positions": CONTEXT, "n_embd": 128, "n_layer": 2, "n_head": 4}
    return _save(directory, lambda ids: GPT2LMHeadModel(GPT2Config(**sizes, **ids)))


def make_bert(directory: Path) -> Path:
    """A BERT-like encoder of about 0.1 million parameters."""
    return _save(directory, lambda ids: BertModel(BertConfig(**_encoder(ids))))


def make_roberta(directory: Path) -> Path:
    """Its like with the positions of RoBERTa, which begin behind the padding token's id."""
    return _save(directory, lambda ids: RobertaModel(RobertaConfig(**_encoder(ids))))


def make_bert_classifier(directory: Path, labels: int = 3, **config: Any) -> Path:
    """A BERT with a classification head; with one label, or two, it can rerank."""
    named = {index: f"label-{index}" for index in range(labels)}
    return _save(
        directory,
        lambda ids: BertForSequenceClassification(
            BertConfig(
                **_encoder(ids), id2label=named, label2id={name: index for index, name in named.items()}, **config
            )
        ),
    )


def make_t5(directory: Path) -> Path:
    """A T5 of about 0.2 million parameters, which summarises behind a prefix."""
    tasks = {"summarization": {"prefix": PREFIX}, "translation_en_to_de": {"prefix": "to German: "},
             "translation_en_to_fr": {"prefix": "to French: "}}  # fmt: skip
    return _save(
        directory,
        lambda ids: T5ForConditionalGeneration(
            T5Config(
                vocab_size=ids["vocab_size"], d_model=64, d_kv=16, d_ff=128, num_layers=3, num_decoder_layers=2,
                num_heads=4, decoder_start_token_id=ids["pad_token_id"], pad_token_id=ids["pad_token_id"],
                eos_token_id=ids["eos_token_id"], n_positions=CONTEXT, task_specific_params=tasks,
            )
        ),
        decoder_start_token_id=0,
    )  # fmt: skip


def make_bart(directory: Path) -> Path:
    """A BART: learnt positions, a forced first token, and a token that it never writes."""
    return _save(
        directory,
        lambda ids: BartForConditionalGeneration(
            BartConfig(
                vocab_size=ids["vocab_size"], d_model=64, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=128,
                decoder_ffn_dim=128, encoder_attention_heads=4, decoder_attention_heads=4,
                max_position_embeddings=CONTEXT, pad_token_id=ids["pad_token_id"], eos_token_id=ids["eos_token_id"],
                bos_token_id=2, decoder_start_token_id=ids["eos_token_id"], forced_eos_token_id=None,
            )
        ),
        decoder_start_token_id=1, forced_bos_token_id=2, bad_words_ids=[[0]],
    )  # fmt: skip


MAKERS: dict[str, Callable[[Path], Path]] = {
    "llama": make_llama,
    "shallow": lambda path: make_llama(path, num_hidden_layers=1),  # for what is not about its answers
    "qwen": make_qwen,
    "gpt2": make_gpt2,
    "bert": make_bert,
    "roberta": make_roberta,
    "three": make_bert_classifier,
    "several": lambda path: make_bert_classifier(path, problem_type="multi_label_classification"),
    "score": lambda path: make_bert_classifier(path, labels=1),
    "fits": lambda path: make_bert_classifier(path, labels=2),
    "t5": make_t5,
    "bart": make_bart,
}
"""The models that tests know by name."""


def greedy_reference(path: Path, prompts: list[str], max_tokens: int) -> list[list[int]]:
    """Greedy tokens of transformers.generate of each prompt alone, without the end token."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        full = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_tokens)
        rows.append([token for token in full[0, ids.shape[1] :].tolist() if token != tokenizer.eos_token_id])
    return rows


def rewritten_reference(path: Path, texts: list[str], max_tokens: int) -> list[list[int]]:
    """Greedy tokens of transformers.generate for each text alone, without what the decoder starts from and its end."""
    model = AutoModelForSeq2SeqLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    given = 1 if model.generation_config.forced_bos_token_id is None else 2
    rows = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        full = model.generate(ids, do_sample=False, num_beams=1, max_new_tokens=max_tokens + given - 1)
        rows.append([token for token in full[0, given:].tolist() if token != tokenizer.eos_token_id])
    return rows


def classified_reference(path: Path, *texts: list[str]) -> NDArray[np.float32]:
    """A classification head's scores for each text (or pair) alone, by transformers itself; shape (texts, labels)."""
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    with torch.inference_mode():
        rows = [model(**tokenizer(*one, return_tensors="pt")).logits[0].numpy() for one in zip(*texts, strict=True)]
    return np.stack(rows)


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


def _encoder(ids: dict[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": ids["vocab_size"], "pad_token_id": ids["pad_token_id"], "max_position_embeddings": CONTEXT,
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    }  # fmt: skip


def _save(directory: Path, build: Callable[[dict[str, Any]], PreTrainedModel], **generation: Any) -> Path:
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
        model.generation_config = GenerationConfig(
            eos_token_id=ids["eos_token_id"], pad_token_id=ids["pad_token_id"], **generation
        )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
