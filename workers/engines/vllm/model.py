"""A model in an engine core, which is a process of its own (several under tensor or pipeline parallelism).

Prompts are tokenised and answers are decoded as for every other engine, so that all of them agree on both.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from itertools import count
from traceback import format_tb, walk_tb
from typing import Any

from shared.contract import InferenceRequest, Kind, Usage
from shared.errors import (
    BadRequest,
    Cancelled,
    EngineBusy,
    EngineDied,
    EngineError,
    EngineLoadError,
    FleetError,
    UnsupportedKind,
)
from shared.settings import ModelSpec, Settings
from workers.engines.base import ContinuousModel, Done, EngineOutput
from workers.engines.common.roles import GENERATING
from workers.engines.common.text import TextCodec, first_line
from workers.engines.vllm.guard import Guard
from workers.engines.vllm.loop import EngineLoop
from workers.engines.vllm.options import POOLING
from workers.engines.vllm.salt import cache_salt
from workers.engines.vllm.steps import Run, Steps

logger = logging.getLogger(__name__)

WATCH_SECONDS = 0.2

READING = ("process_inputs", "process_inputs_async")
"""The functions of vLLM that read a request: what is not right there is the caller's, whatever its type."""

CLOSE_SECONDS = 60.0


class VLLMModel(ContinuousModel):
    """A model in an engine core."""

    def __init__(
        self, spec: ModelSpec, settings: Settings, engine: Any, loop: EngineLoop, guard: Guard, notes: tuple[str, ...]
    ) -> None:
        config = engine.vllm_config.model_config
        self.spec = spec
        self._settings = settings
        self.kinds = frozenset(spec.kinds) & (POOLING if config.runner_type == "pooling" else GENERATING)
        self.max_context = int(config.max_model_len)
        self.precision = str(config.dtype).removeprefix("torch.")
        self.notes = notes
        self.codec = TextCodec(spec, self.max_context)
        self.dimensions = int(config.get_hidden_size()) if Kind.EMBED in self.kinds else None
        self.eos = _eos_tokens(config, self.codec)
        self._engine = engine
        self._loop = loop
        self._guard = guard
        self._steps = Steps(engine, self)
        self._numbers = count()
        self._tasks: dict[str, set[asyncio.Task[None]]] = {}
        self._closing = False
        self._watch = loop.run(self._watch_core())

    @property
    def alive(self) -> bool:
        """Whether the engine core runs."""
        return not self._engine.errored

    def submit(self, request: InferenceRequest, done: Done) -> None:
        """Take a request into the running batch."""
        try:
            if request.kind not in self.kinds:
                raise UnsupportedKind(f"model {self.spec.name!r} does not serve {request.kind} requests on vllm")
            work = self._embed(request) if request.kind in POOLING else self._generate(request)
        except FleetError as error:
            done(error)
            return
        self._loop.loop.call_soon_threadsafe(self._start, request.id, work, done)

    def check(self, request: InferenceRequest) -> None:
        """Refuse a request with a text that does not fit."""
        if request.kind in self.kinds:
            self.codec.check_texts(request)

    def abort(self, request_id: str) -> None:
        """Take a request out of the running batch; it ends as cancelled."""
        self._loop.loop.call_soon_threadsafe(self._cancel, request_id)

    def warmup(self) -> None:
        """Run one request."""
        kind = next(iter(self.kinds))
        inputs = {Kind.EMBED: {"texts": ["a"]}, Kind.CHAT: {"prompt": "a"}, Kind.GENERATE: {"prompt": "a"}}[kind]
        kind = Kind.GENERATE if kind is Kind.CHAT else kind
        request = InferenceRequest.parse(
            {"model": self.spec.name, "kind": kind, "inputs": inputs, "params": {"max_tokens": 2}}
        )
        work = self._embed(request) if kind is Kind.EMBED else self._generate(request)
        try:
            self._loop.run(work).result()
        except Exception as error:
            raise EngineLoadError(f"vllm loads {self.spec.name!r} but cannot run it: {self._told(error)}") from error

    def close(self) -> None:
        """Let what runs end, then end the engine core."""
        until = time.monotonic() + CLOSE_SECONDS
        while self._tasks and self.alive and time.monotonic() < until:
            time.sleep(0.01)
        self._closing = True
        self._watch.cancel()
        self._loop.run(_off_the_loop(self._engine.shutdown)).result(timeout=CLOSE_SECONDS)
        self._loop.close()
        self._guard.close()

    # -- on the loop ------------------------------------------------------------------------------------------------

    def _start(self, request_id: str, work: Coroutine[Any, Any, EngineOutput], done: Done) -> None:
        task = self._loop.loop.create_task(self._answer(work, done))
        running = self._tasks.setdefault(request_id, set())
        running.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            if task.cancelled():  # before its first step: it had no chance to say so itself
                work.close()
                done(Cancelled())
            running.discard(task)
            if not running and self._tasks.get(request_id) is running:
                del self._tasks[request_id]

        task.add_done_callback(ended)

    def _cancel(self, request_id: str) -> None:
        for task in self._tasks.get(request_id, ()):
            task.cancel()

    async def _answer(self, work: Coroutine[Any, Any, EngineOutput], done: Done) -> None:
        outcome: EngineOutput | FleetError
        try:
            outcome = await work
        except asyncio.CancelledError:
            outcome = Cancelled()
        except FleetError as error:
            outcome = error
        except Exception as error:  # noqa: BLE001  # the boundary: whatever vLLM raises is the request's outcome
            outcome = self._as_error(error)
        done(outcome)

    async def _watch_core(self) -> None:
        while not self._closing:
            await asyncio.sleep(WATCH_SECONDS)
            if not self.alive:
                if self.on_death is not None and not self._closing:
                    self.on_death(self._death())
                return

    def _generate(self, request: InferenceRequest) -> Coroutine[Any, Any, EngineOutput]:
        prompt = self.codec.prompts(request)[0]
        return self._generated(request, prompt, self._sampling(request, len(prompt)))

    async def _generated(self, request: InferenceRequest, prompt: list[int], sampling: Any) -> EngineOutput:
        name = f"{request.id}#{next(self._numbers)}"
        given: dict[str, Any] = {"prompt_token_ids": prompt}
        if salt := cache_salt(request.tenant, self._settings):
            given["cache_salt"] = salt
        end_tokens = frozenset() if request.params.ignore_eos else self.eos
        with self._steps.following(name, request.id, end_tokens) as run:
            out = await _last(self._engine.generate(given, sampling, name, priority=request.priority.wire))
        return self._output(request, len(prompt), out, run)

    def _output(self, request: InferenceRequest, prompt_tokens: int, out: Any, run: Run) -> EngineOutput:
        answer = out.outputs[0]
        tokens = list(answer.token_ids)
        if answer.finish_reason == "stop" and tokens and tokens[-1] in run.end_tokens:
            tokens.pop()
        text = self.codec.stopped(tokens, request.params.stop)
        if text is None:
            text = self.codec.decode(tokens)
        outputs: dict[str, Any] = {"text": text, "token_ids": tokens, "finish_reason": answer.finish_reason or "stop"}
        if request.kind is Kind.CHAT:
            outputs["message"] = {"role": "assistant", "content": text}
        if request.params.logprobs is not None:
            outputs["logprobs"] = [
                _logprobs(token, found, request.params.logprobs)
                for token, found in zip(tokens, answer.logprobs or (), strict=False)
            ]
        cached = out.num_cached_tokens or 0
        prefill_ms, decode_ms = run.times_ms()
        return EngineOutput(
            outputs,
            Usage(prompt_tokens=prompt_tokens, completion_tokens=len(tokens)),
            prefill_ms=prefill_ms,
            decode_ms=decode_ms,
            cache_hit=cached > 0,
            metadata={"cached_tokens": cached} if cached else {},
        )

    def _sampling(self, request: InferenceRequest, prompt_tokens: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        params = request.params
        schema = params.json_schema
        return SamplingParams(
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            seed=params.seed,
            stop=list(params.stop),
            ignore_eos=params.ignore_eos,
            max_tokens=min(params.max_tokens, (self.max_context or math.inf) - prompt_tokens),
            logprobs=params.logprobs,
            structured_outputs=None if schema is None else StructuredOutputsParams(json=schema),
            detokenize=bool(params.stop),  # only what looks for stop strings needs text on the way
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _embed(self, request: InferenceRequest) -> Coroutine[Any, Any, EngineOutput]:
        return self._embedded(request, [list(piece.ids) for piece in self.codec.encode_texts(request)])

    async def _embedded(self, request: InferenceRequest, texts: Sequence[list[int]]) -> EngineOutput:
        started = time.perf_counter()
        vectors = await asyncio.gather(*(self._vector(request, ids) for ids in texts))
        if not all(math.isfinite(value) for vector in vectors for value in vector):
            raise EngineError("the embedding is not finite")
        return EngineOutput(
            {"embeddings": vectors, "dimensions": len(vectors[0])},
            Usage(prompt_tokens=sum(map(len, texts))),
            prefill_ms=(time.perf_counter() - started) * 1000,
        )

    async def _vector(self, request: InferenceRequest, ids: list[int]) -> list[float]:
        from vllm import PoolingParams

        params = PoolingParams(task="embed", use_activation=self.spec.normalize)
        name = f"{request.id}#{next(self._numbers)}"
        given = {"prompt_token_ids": ids}
        with self._steps.following(name, request.id):
            out = await _last(self._engine.encode(given, params, name, priority=request.priority.wire))
        vector: list[float] = out.outputs.data.float().tolist()
        return vector

    # -- errors -----------------------------------------------------------------------------------------------------

    def _as_error(self, error: Exception) -> FleetError:
        from vllm.exceptions import VLLMClientError, VLLMServerError

        if not self.alive:
            return self._death()
        if isinstance(error, VLLMClientError) or (isinstance(error, ValueError) and _raised_in(error, READING)):
            return BadRequest(f"vllm refuses the request: {first_line(error)}")
        if isinstance(error, VLLMServerError):
            return EngineBusy(f"vllm: {self._told(error)}")
        logger.error("vllm failed: %s\n%s", type(error).__name__, "".join(format_tb(error.__traceback__)))
        return EngineError(f"vllm: {self._told(error)}")

    def _death(self) -> EngineDied:
        return EngineDied(f"the vllm engine core of {self.spec.name!r} died")

    def _told(self, error: BaseException) -> str:
        if not self.alive:
            return "its engine core died; its log says why"
        return f"{type(error).__name__}: {first_line(error.__cause__ or error)}"


def _raised_in(error: Exception, functions: Sequence[str]) -> bool:
    """Whether an error went through a function of one of these names."""
    return any(frame.f_code.co_name in functions for frame, _ in walk_tb(error.__traceback__))


async def _last(answers: AsyncIterator[Any]) -> Any:
    last = None
    async for answer in answers:
        last = answer
    return last


async def _off_the_loop(work: Any) -> None:
    await asyncio.get_running_loop().run_in_executor(None, work)


def _logprobs(token: int, found: Any, most: int) -> dict[str, Any]:
    """The log probability of a token of the answer, and of the ``most`` likeliest at its place, best first."""
    ranked = sorted(found.items(), key=lambda entry: entry[1].rank)[:most]
    return {
        "token_id": token,
        "logprob": found[token].logprob,
        "top": [{"token_id": other, "logprob": entry.logprob} for other, entry in ranked],
    }


def _eos_tokens(config: Any, codec: TextCodec) -> frozenset[int]:
    for value in (
        config.try_get_generation_config().get("eos_token_id"),
        getattr(config.hf_config, "eos_token_id", None),
        codec.tokenizer.eos_token_id,
    ):
        if value is not None:
            return frozenset(value if isinstance(value, list) else [value])
    return frozenset()
