"""A model in the processes of a rank group, as the worker sees it."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from shared.contract import InferenceRequest, Kind
from shared.errors import EngineDied
from shared.settings import ModelSpec
from workers.engines.base import Emit, LoadedModel, NewTokens
from workers.engines.common.processes import error_from_json
from workers.engines.deepspeed.group import RankGroup
from workers.engines.deepspeed.wire import output_from_json

WATCH_SECONDS = 0.5


class DeepSpeedModel(LoadedModel):
    """A model in the memory of a rank group.

    ``metadata`` says how it is held: ``tensor_parallel``, ``pipeline_parallel``, ``device``, ``dtype``,
    ``kernel_injection``, ``zero_offload``, and ``notes`` on what is not as it was configured.
    """

    def __init__(self, spec: ModelSpec, group: RankGroup, loaded: Mapping[str, Any]) -> None:
        self.spec = spec
        self.group = group
        self.kinds = frozenset(map(Kind, loaded["kinds"]))
        self.max_context = loaded["max_context"]
        self.memory_bytes = loaded["memory_bytes"]
        self.metadata: dict[str, Any] = {**loaded["metadata"], "notes": loaded["notes"]}
        self.precision = str(self.metadata["dtype"])
        self.notes = tuple(loaded["notes"])
        self._batch = 0
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name=f"deepspeed-watch-{spec.name}", daemon=True).start()

    @property
    def alive(self) -> bool:
        """Whether all processes are running. A model that is not alive fails every batch: it has to be loaded again."""
        return self.group.alive

    def infer(self, requests: Sequence[InferenceRequest], emit: Emit) -> None:
        """Run a batch of one kind.

        Raises :class:`~shared.errors.EngineDied` as soon as one of the processes has died or none makes progress,
        :class:`EngineOutOfMemory` where one ran out of memory, what the engine raised for the batch otherwise.
        """
        self._run({"op": "infer", "requests": [request.model_dump(mode="json") for request in requests]}, emit)

    def check(self, request: InferenceRequest) -> None:
        """Refuse a request with a text that does not fit."""
        self._run({"op": "check", "request": request.model_dump(mode="json")}, None)

    def abort(self, request_id: str) -> None:
        """End a request of the running batch at the next token."""
        self.group.notify({"op": "abort", "id": request_id})

    def warmup(self) -> None:
        """Run two tokens once: kernels, connections and lazy modules are then in place."""
        self._run({"op": "warmup"}, None)

    def close(self) -> None:
        """End the processes."""
        self._closed.set()
        self.group.close()

    def _watch(self) -> None:
        """A death is known at once where a batch runs; this is for the time between batches."""
        while not self._closed.wait(WATCH_SECONDS):
            if not self.alive:
                if self.on_death is not None and not self._closed.is_set():
                    self.on_death(EngineDied(f"a process of the deepspeed engine for {self.spec.name!r} died"))
                return

    def _run(self, message: Mapping[str, Any], emit: Emit | None) -> None:
        self._batch += 1
        self.group.send({**message, "batch": self._batch, "tell": self.on_tokens is not None})
        while True:
            answer = self.group.receive()
            if answer["batch"] != self._batch:
                continue  # of a batch that was left before its end
            if "done" in answer:
                return
            if "failed" in answer:
                raise error_from_json(answer["failed"])
            if "tokens" in answer:
                self.tell([NewTokens(*new) for new in answer["tokens"]])
            elif emit is not None and "index" in answer:
                error = "error" in answer
                emit(answer["index"], error_from_json(answer["error"]) if error else output_from_json(answer["output"]))
