"""What each step of an engine core has made, heard of where vLLM itself reads it.

The way that vLLM offers, ``RequestOutputKind.DELTA``, builds an output and wakes a task for each request at each step.
Its output processor is given all of a step at once, so one of its methods is wrapped. Of vLLM's inside, as it is in
0.32, this uses ``AsyncLLM.output_processor``, its ``process_outputs`` (whose first argument is the step's outputs) and
``request_states`` (with their ``external_req_id``), and of an output ``request_id``, ``new_token_ids``,
``finish_reason`` and ``pooling_output``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from workers.engines.base import LoadedModel, NewTokens


@dataclass(slots=True)
class Run:
    """A request, or one of its texts, from when vLLM was given it. Times are ``time.perf_counter()``'s."""

    request_id: str
    end_tokens: frozenset[int]
    """Those with which it ends and which are no part of its answer."""
    started: float
    first_at: float | None = None
    """When its first token was there."""

    def times_ms(self) -> tuple[float, float]:
        """To the first token, and from there until now."""
        now = time.perf_counter()
        first = now if self.first_at is None else self.first_at
        return (first - self.started) * 1000, (now - first) * 1000


class Steps:
    """Listens to an engine core for a model, and lets the model tell of it. Used on vLLM's event loop."""

    def __init__(self, engine: Any, model: LoadedModel) -> None:
        self._model = model
        self._runs: dict[str, Run] = {}
        self._processor = engine.output_processor
        self._process = self._processor.process_outputs
        self._processor.process_outputs = self._process_and_tell

    @contextmanager
    def following(self, name: str, request_id: str, end_tokens: frozenset[int] = frozenset()) -> Iterator[Run]:
        """What the core makes under the name that vLLM is given belongs to a request."""
        run = self._runs[name] = Run(request_id, end_tokens, time.perf_counter())
        try:
            yield run
        finally:
            del self._runs[name]

    def _process_and_tell(self, outputs: Sequence[Any], *arguments: Any, **named: Any) -> Any:
        states = self._processor.request_states  # those of requests that end are gone afterwards
        made = [(self._run_of(states.get(output.request_id)), output) for output in outputs]
        processed = self._process(outputs, *arguments, **named)  # it takes surplus tokens away
        now = time.perf_counter()
        tell = self._model.telling
        told: list[NewTokens] = []
        for run, output in made:
            if run is None:
                continue
            tokens = output.new_token_ids
            if run.first_at is None and tokens:
                run.first_at = now
            if tokens and tokens[-1] in run.end_tokens and str(output.finish_reason) == "stop":
                tokens = tokens[:-1]
            if tell is not None and (tokens or output.pooling_output is not None):
                told.append(NewTokens(run.request_id, tokens))
        if tell is not None and told:
            tell(told)
        return processed

    def _run_of(self, state: Any) -> Run | None:
        return None if state is None else self._runs.get(state.external_req_id)
