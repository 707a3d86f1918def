"""What every rank does with its part of the model: the operations of a batch, one after the other.

Batches that are under way at the same time (the micro-batches of a pipeline) are told apart by their ``slot``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
import torch

from workers.engines.common.decoding import Decoding
from workers.engines.common.lengths import Floats, Padded
from workers.engines.common.sampling import Logits
from workers.engines.deepspeed.stage import Place
from workers.engines.deepspeed.wire import Arrays, Channel
from workers.engines.pytorch.model import TorchModel, memory_errors

ANSWERED = frozenset({"prefill", "step"})
"""Operations that end in scores."""


class Shard:
    """One rank's part of the model, and its batches. Used by one thread at a time."""

    def __init__(self, model: TorchModel, place: Place) -> None:
        self.model = model
        self.place = place
        self._batches: dict[int, Decoding] = {}
        self._scores: dict[int, Logits] = {}

    def run(self, message: Mapping[str, Any], arrays: Arrays) -> Logits | Floats | None:
        """Carry out one operation. Every rank has to, for it may hold collective ones.

        - ``prefill`` (``ids``, ``mask`` of shape (rows, longest)) begins the batch of a slot.
        - ``step`` (``tokens`` of shape (rows,)) appends a token to each row.
        - ``keep`` (``rows``) goes on with these rows only; ``drop`` forgets the batch.
        - ``encode`` and ``classify`` (``ids``, ``mask``, ``types``) return token vectors and scores of labels.

        Raises :class:`~shared.errors.EngineOutOfMemory` and :class:`~shared.errors.EngineError`.
        """
        slot = int(message.get("slot", 0))
        with torch.inference_mode(), memory_errors():
            match message["op"]:
                case "prefill":
                    self._batches[slot] = self.model.decoding()
                    self._scores[slot] = self._batches[slot].prefill(arrays["ids"], arrays["mask"])
                    return self._scores[slot]
                case "step":
                    self._scores[slot] = self._batches[slot].step(arrays["tokens"])
                    return self._scores[slot]
                case "keep":
                    self._batches[slot].keep(message["rows"])
                case "drop":
                    self._batches.pop(slot, None)
                    self._scores.pop(slot, None)
                case "encode":
                    return self.model.encode(Padded(**arrays))
                case "classify":
                    return self.model.classify(Padded(**arrays))
                case other:
                    raise ValueError(f"no such operation: {other!r}")
        return None

    def follow(self, leader: Channel) -> NoReturn:
        """Carry out what the leader sends until it is gone (``EOFError``).

        The rank that has a pipeline's scores answers with the best tokens, and with single rows where they are asked
        for: all scores of all rows would be much to send.
        """
        answers = self.place.answers
        while True:
            message, arrays = leader.receive()
            slot = int(message.get("slot", 0))
            if message["op"] == "scores":
                leader.send({}, scores=self._scores[slot].row(message["row"]))
                continue
            found = self.run(message, arrays)
            if answers and message["op"] in ANSWERED and isinstance(found, Logits):
                tokens, scores = found.best()
                leader.send({}, tokens=tokens.astype(np.int64), scores=scores.astype(np.float32))
