"""Trains the demo model: ``make demo-model``. A small Llama that adds, reverses and sorts, letter by letter.

It is trained on a CPU in minutes, with a fixed seed. What it writes (``demo/model``) loads with ``transformers`` like
any other model; the accuracy on questions it never saw goes into its README.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo.questions import TASKS, Question, draw

SPECIAL = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CONTEXT = 256
IGNORED = -100


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and a few special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """About 0.8 million parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, tie_word_embeddings=True, rope_theta=10000.0,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


class Encoder:
    """Turns questions into token ids: the prompt is not learned, the answer and its end are."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._end = tokenizer.eos_token_id
        self._pad = tokenizer.pad_token_id

    def prompt(self, question: Question, chat: bool) -> list[int]:
        """The ids of the question in one of its forms."""
        text = question.prompt
        if chat:
            text = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": question.chat}], tokenize=False, add_generation_prompt=True
            )
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def batch(self, questions: list[tuple[Question, bool]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and labels, right padded, both of shape (questions, longest)."""
        rows, labels = [], []
        for question, chat in questions:
            prompt = self.prompt(question, chat)
            answer = [*self._tokenizer(question.answer, add_special_tokens=False)["input_ids"], self._end]
            rows.append(prompt + answer)
            labels.append([IGNORED] * len(prompt) + answer)
        longest = max(map(len, rows))
        ids = torch.tensor([row + [self._pad] * (longest - len(row)) for row in rows])
        targets = torch.tensor([row + [IGNORED] * (longest - len(row)) for row in labels])
        return ids, targets


def train(model: LlamaForCausalLM, encoder: Encoder, steps: int, batch_size: int, peak: float, seed: int) -> None:
    """AdamW with a linear warm-up and a cosine decay to nothing."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = 200
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
    )
    model.train()
    started = time.monotonic()
    for step in range(steps):
        questions = [(draw(rng, held_out=False), rng.random() < 0.35) for _ in range(batch_size)]
        ids, labels = encoder.batch(questions)
        loss = model(input_ids=ids, labels=labels, attention_mask=(ids != 0).long()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 200 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.monotonic() - started:.0f} s", flush=True)


@torch.inference_mode()
def accuracy(model: LlamaForCausalLM, encoder: Encoder, count: int, seed: int) -> dict[str, float]:
    """Share of right answers per task and form over ``count`` held-out questions each."""
    model.eval()
    rng = random.Random(seed)
    shares = {}
    for task in TASKS:
        for chat in (False, True):
            right = 0
            questions: list[Question] = []
            while len(questions) < count:
                question = task(rng)
                if question.held_out:
                    questions.append(question)
            for question in questions:
                ids = torch.tensor([encoder.prompt(question, chat)])
                out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
                right += encoder._tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == question.answer
            shares[f"{task.__name__} ({'chat' if chat else 'prompt'})"] = right / count
    return shares


CARD = """# The demo model

A Llama of {parameters:.2f} million parameters with one token per byte. It was trained by `demo/train.py`
(`make demo-model` does it again: {steps} steps of {batch} questions, seed {seed}, on a CPU) to add two numbers below
100, to reverse words and to sort their letters, as a prompt to complete (`12+34=`) and as a chat (`What is 12+34?`).
It knows nothing else. Licence: Apache-2.0.

Share of right answers to {count} questions of each kind that were kept out of training, greedy decoding:

{table}
"""


def main() -> None:
    """Train, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--count", type=int, default=200)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    encoder = Encoder(tokenizer)
    train(model, encoder, options.steps, options.batch, options.rate, options.seed)
    model.to(torch.bfloat16).to(torch.float32)  # what is measured is what is saved
    shares = accuracy(model, encoder, options.count, seed=1)
    table = "\n".join(["| task | right |", "| --- | --- |", *(f"| {k} | {v:.1%} |" for k, v in shares.items())])
    print(table)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    model.to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    card = CARD.format(
        parameters=model.num_parameters() / 1e6, steps=options.steps, batch=options.batch, seed=options.seed,
        count=options.count, table=table,
    )  # fmt: skip
    (options.out / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
