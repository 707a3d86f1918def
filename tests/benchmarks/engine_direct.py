"""An engine called directly in its best batched form, without anything of the fleet between: one line in, one line out.

``python -m tests.benchmarks.engine_direct ENGINE MODEL BATCH``. Each line on standard input is an object with prompts
and ``max_tokens``; each line on standard output the seconds it took to answer all of them.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared.contract import EngineName, InferenceRequest
from shared.settings import ModelSpec, Settings

Run = Callable[[list[str], int], None]


def transformers_run(path: str, batch: int) -> Run:
    """``model.generate`` on left padded batches."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")

    def run(prompts: list[str], max_tokens: int) -> None:
        for first in range(0, len(prompts), batch):
            inputs = tokenizer(prompts[first : first + batch], return_tensors="pt", padding=True)
            with torch.inference_mode():
                out = model.generate(
                    input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=False,
                    max_new_tokens=max_tokens, min_new_tokens=max_tokens,
                )  # fmt: skip
            tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return run


def infer_run(engine: EngineName, path: str, batch: int) -> Run:
    """The engine's own batched ``infer``, batch after batch."""
    from workers.engines import engine_class

    settings = Settings.model_validate(
        {
            "models": {"cache_dir": str(Path(path).parent / "cache"), "catalog": {"m": {"path": path}}},
            "optimization": {"deepspeed": {"dtype": "float32", "replace_with_kernel_inject": False}},
        }
    )
    model = engine_class(engine)(settings).load(ModelSpec(name="m", path=path, kinds=("generate",)))
    model.warmup()

    def run(prompts: list[str], max_tokens: int) -> None:
        params = {"max_tokens": max_tokens, "ignore_eos": True}
        requests = [InferenceRequest.parse({"model": "m", "inputs": {"prompt": p}, "params": params}) for p in prompts]
        for first in range(0, len(requests), batch):
            model.infer(requests[first : first + batch], lambda index, outcome: None)

    return run


def vllm_run(path: str, batch: int) -> Run:
    """``AsyncLLM.generate`` with everything submitted at once."""
    from workers.engines.vllm.options import engine_arguments, on_cuda, prepare_environment

    settings = Settings().optimization.vllm.model_copy(update={"max_num_seqs": batch})
    prepare_environment(settings, not on_cuda())
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    spec = ModelSpec(name="m", path=path, kinds=("generate",))
    arguments, _ = engine_arguments(spec, settings, not on_cuda(), Path(path).parent)
    arguments.pop("kv_events_config", None)
    loop = asyncio.new_event_loop()
    count = iter(range(1 << 60))

    async def start() -> Any:
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))

    engine = loop.run_until_complete(start())

    async def one(prompt: str, max_tokens: int) -> None:
        params = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY
        )
        async for _ in engine.generate(prompt, params, str(next(count))):
            pass

    async def everything(prompts: list[str], max_tokens: int) -> None:
        await asyncio.gather(*(one(prompt, max_tokens) for prompt in prompts))

    def run(prompts: list[str], max_tokens: int) -> None:
        loop.run_until_complete(everything(prompts, max_tokens))

    return run


def main() -> None:
    """Load, say so, then run what standard input asks for."""
    name, path, batch = sys.argv[1], sys.argv[2], int(sys.argv[3])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    if name == "transformers":
        run = transformers_run(path, batch)
    elif name == "pytorch-unbatched":
        run = infer_run(EngineName.PYTORCH, path, 1)
    elif name == "vllm":
        run = vllm_run(path, batch)
    else:
        run = infer_run(EngineName(name), path, batch)
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        started = time.perf_counter()
        run(asked["prompts"], asked["max_tokens"])
        print(time.perf_counter() - started, file=out, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
