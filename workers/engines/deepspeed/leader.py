"""The leader of a rank group: runs the decode loop, has every rank carry out its operations, answers the worker."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, ClassVar, Literal, NoReturn

import numpy as np

from shared.contract import InferenceRequest, Kind
from shared.errors import EngineError, FleetError, UnsupportedKind
from workers.engines.base import EngineOutput
from workers.engines.common.decoding import Decoding, generate
from workers.engines.common.embedding import embed
from workers.engines.common.lengths import Floats, Padded
from workers.engines.common.quotes import traceback_of
from workers.engines.common.roles import WRITING, Role
from workers.engines.common.sampling import Logits, Scores, Tokens
from workers.engines.common.scoring import score
from workers.engines.deepspeed.group import PEER_LOST
from workers.engines.deepspeed.report import Report
from workers.engines.deepspeed.shard import ANSWERED, Shard
from workers.engines.deepspeed.stage import Place, answering
from workers.engines.deepspeed.wire import Arrays, Channel

logger = logging.getLogger(__name__)

EXTRA_MICRO_BATCHES = 1
"""Beyond one a stage: while the leader samples for one micro-batch, each stage has another to work at."""


class Ranks:
    """All ranks as one: an operation is carried out by every one of them, in one order."""

    def __init__(
        self, shard: Shard, place: Place, links: Sequence[Channel], fail: Callable[[BaseException], NoReturn]
    ) -> None:
        self._shard = shard
        self._links = links
        self._fail = fail
        self._lock = threading.Lock()
        self._asked: deque[Future[Arrays]] = deque()
        self._answers: Channel | None = None
        if place.pipeline > 1:
            self._answers = links[answering(place.tensor, place.pipeline) - 1]
            threading.Thread(target=self._take_answers, name="answers", daemon=True).start()

    def call(self, op: str, arrays: Arrays, slot: int = 0, rows: Sequence[int] = ()) -> Any:
        """Carry out an operation of :meth:`Shard.run`. Scores of a pipeline are waited for without holding others up.

        Where there are other ranks, a failure ends the process: they are inside the same operation, and have no way to
        know that it will not be completed.
        """
        message = {"op": op, "slot": slot, **({"rows": list(rows)} if op == "keep" else {})}
        answer: Future[Arrays] | None = None
        with self._lock:
            try:
                for link in self._links:
                    link.send(message, **arrays)
                if self._answers is not None and op in ANSWERED:
                    answer = Future()
                    self._asked.append(answer)
                found = self._shard.run(message, arrays)
            except BaseException as error:
                if self._links:
                    self._fail(error)
                raise
        return found if answer is None else _FarLogits(self, slot, answer.result())

    def scores(self, slot: int, row: int) -> Scores:
        """The scores of one row of a pipeline's last operation on a slot."""
        answer: Future[Arrays] = Future()
        with self._lock:
            if self._answers is None:
                raise EngineError("there is no other rank to ask for scores")
            self._asked.append(answer)
            self._answers.send({"op": "scores", "slot": slot, "row": row})
        return answer.result()["scores"]

    def _take_answers(self) -> None:
        """Answers come in the order of the questions."""
        while self._answers is not None:
            try:
                _, arrays = self._answers.receive()
            except (EOFError, OSError):
                os._exit(PEER_LOST)
            self._asked.popleft().set_result(arrays)


class _FarLogits(Logits):
    """Scores that another rank has."""

    def __init__(self, ranks: Ranks, slot: int, best: Arrays) -> None:
        self._ranks = ranks
        self._slot = slot
        self._best = best

    def best(self) -> tuple[Tokens, Scores]:
        """The most likely token of each row and its score."""
        return self._best["tokens"], self._best["scores"]

    def row(self, index: int) -> Scores:
        """The scores of one row."""
        return self._ranks.scores(self._slot, index)


class _RankDecoding(Decoding):
    """A batch that all ranks carry forward."""

    def __init__(self, ranks: Ranks, slot: int, progress: Callable[[], None]) -> None:
        self._ranks = ranks
        self._slot = slot
        self._progress = progress

    def prefill(self, ids: Tokens, mask: Tokens) -> Logits:
        """Read the prompts."""
        return self._scored("prefill", {"ids": ids, "mask": mask})

    def step(self, tokens: Tokens) -> Logits:
        """Append one token to each row."""
        return self._scored("step", {"tokens": tokens})

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        self._ranks.call("keep", {}, self._slot, rows)

    def _scored(self, op: str, arrays: Arrays) -> Logits:
        found: Logits = self._ranks.call(op, arrays, self._slot)
        self._progress()
        return found


class _RankRewriting(_RankDecoding):
    """The same for a sequence-to-sequence model, whose encoder reads from the left."""

    padding: ClassVar[Literal["left", "right"]] = "right"


class Leader:
    """Takes batches from the worker and answers them."""

    def __init__(
        self, shard: Shard, place: Place, worker: Channel, links: Sequence[Channel],
        fail: Callable[[BaseException], NoReturn],
    ) -> None:  # fmt: skip
        self._model = shard.model
        self._place = place
        self._worker = worker
        self._fail = fail
        self._batches: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._ranks = Ranks(shard, place, links, fail)
        self._report = Report(worker)
        # The middle of a pipeline hands on what is not a model's last vectors.
        self.kinds = self._model.kinds - ({Kind.EMBED} if place.pipeline > 1 else set())

    def serve(self) -> NoReturn:
        """Answer batches until the worker is gone, which ends the process."""
        threading.Thread(target=self._listen, name="worker", daemon=True).start()
        while True:
            message = self._batches.get()
            self._report.begin(message["batch"])
            self._model.on_tokens = self._report.tell if message["tell"] else None
            requests: list[InferenceRequest] = []
            try:
                if message["op"] == "warmup":
                    self._warmup()
                elif message["op"] == "check":
                    self._model.check(InferenceRequest.parse(message["request"]))
                else:
                    requests = [InferenceRequest.parse(data) for data in message["requests"]]
                    self._infer(requests)
            except FleetError as error:
                self._report.failed(error)
            except Exception as error:  # noqa: BLE001  # the boundary: the worker is told whatever it was
                logger.error("a batch failed\n%s", traceback_of(error, requests))
                self._report.failed(error)
            else:
                self._report.done()

    def _listen(self) -> None:
        """Put batches in line; what is not wanted any longer is heard of while one runs."""
        while True:
            try:
                message, _ = self._worker.receive()
            except (EOFError, OSError):
                os._exit(PEER_LOST)
            except BaseException as error:  # noqa: BLE001 - the process ends with it: nobody else would
                self._fail(error)
            if message["op"] == "abort":
                self._model.unwanted.add(message["id"])
            else:
                self._model.unwanted.clear()  # the batch that they were of is through
                self._batches.put(message)

    def _infer(self, requests: Sequence[InferenceRequest]) -> None:
        kind = requests[0].kind
        model = self._model
        if kind not in self.kinds:
            for index in range(len(requests)):
                self._report.emit(index, UnsupportedKind(f"model {model.spec.name!r} does not serve {kind} requests"))
        elif kind in WRITING:
            self._generate(requests)
        elif model.labels is not None:
            score(requests, model.codec, model.labels, model.pad, self._classify, self._report.emit, model.telling)
        else:
            embed(requests, model.codec, model.spec, model.pad, self._encode, self._report.emit, model.telling)

    def _generate(self, requests: Sequence[InferenceRequest]) -> None:
        """One loop; in a pipeline one for each micro-batch, side by side, so that every stage has work."""
        stages = self._place.pipeline
        count = 1 if stages == 1 else min(len(requests), stages + EXTRA_MICRO_BATCHES)
        errors: list[Exception] = []

        def run(slot: int) -> None:
            mine = range(slot, len(requests), count)

            def emit(index: int, outcome: EngineOutput | FleetError) -> None:
                self._report.emit(mine[index], outcome)

            decoding = self._decoding(slot)
            model = self._model
            asked = [requests[place] for place in mine]
            try:
                generate(asked, model.codec, decoding, model.eos, model.pad, emit, model.telling, model.unwanted)
            except Exception as error:  # noqa: BLE001 - it is raised when the other micro-batches are through
                errors.append(error)
            finally:
                self._ranks.call("drop", {}, slot)

        threads = [threading.Thread(target=run, args=(slot,), name=f"micro-batch-{slot}") for slot in range(1, count)]
        for thread in threads:
            thread.start()
        run(0)
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def _encode(self, texts: Padded) -> Floats:
        return self._read("encode", texts)

    def _classify(self, texts: Padded) -> Floats:
        return self._read("classify", texts)

    def _read(self, op: str, texts: Padded) -> Floats:
        found: Floats = self._ranks.call(op, {"ids": texts.ids, "mask": texts.mask, "types": texts.types})
        self._report.progress()
        return found

    def _warmup(self) -> None:
        ids = np.full((1, 2), self._model.pad, dtype=np.int64)
        texts = Padded(ids, np.ones_like(ids), np.zeros_like(ids))
        if self._model.role in (Role.DECODER, Role.SEQ2SEQ):
            self._decoding(0).prefill(texts.ids, texts.mask)
            self._ranks.call("drop", {})
        elif self._model.role is Role.CLASSIFIER:
            self._classify(texts)
        else:
            self._encode(texts)

    def _decoding(self, slot: int) -> _RankDecoding:
        kind = _RankRewriting if self._model.role is Role.SEQ2SEQ else _RankDecoding
        return kind(self._ranks, slot, self._report.progress)
