"""What the engines that run transformers models have in common: which answer a request of which kind gets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np

from shared.contract import InferenceRequest, Kind
from shared.errors import UnsupportedKind
from workers.engines.base import Emit, LoadedModel
from workers.engines.common.decoding import Decoding, generate
from workers.engines.common.embedding import embed
from workers.engines.common.lengths import Floats, Padded
from workers.engines.common.roles import WRITING, Role
from workers.engines.common.scoring import Labels, score
from workers.engines.common.text import TextCodec


class TransformerModel(LoadedModel):
    """A transformers model in memory, whatever runs it."""

    role: Role
    codec: TextCodec
    labels: Labels | None
    """A sequence classifier's; ``None`` for the others."""
    eos: frozenset[int]
    pad: int
    unwanted: set[str]
    """Ids of running requests whose answers are no longer wanted."""

    @abstractmethod
    def decoding(self) -> Decoding:
        """A new batch of a model that writes."""

    @abstractmethod
    def encode(self, texts: Padded) -> Floats:
        """Token vectors of the last layer, of shape (texts, longest, size)."""

    @abstractmethod
    def classify(self, texts: Padded) -> Floats:
        """A sequence classifier's scores, of shape (texts, labels)."""

    @abstractmethod
    def running(self) -> AbstractContextManager[None]:
        """What runs the model is used within this; the library's errors leave it as the fleet's."""

    def infer(self, requests: Sequence[InferenceRequest], emit: Emit) -> None:
        """Run a batch of one kind."""
        kind = requests[0].kind
        self.unwanted = set()
        with self.running():
            if kind not in self.kinds:
                for index in range(len(requests)):
                    emit(index, UnsupportedKind(f"model {self.spec.name!r} does not serve {kind} requests"))
            elif kind in WRITING:
                decoding = self.decoding()
                generate(requests, self.codec, decoding, self.eos, self.pad, emit, self.telling, self.unwanted)
            elif self.labels is not None:
                score(requests, self.codec, self.labels, self.pad, self.classify, emit, self.telling)
            else:
                embed(requests, self.codec, self.spec, self.pad, self.encode, emit, self.telling)

    def check(self, request: InferenceRequest) -> None:
        """Refuse a request with a text that does not fit."""
        if request.kind in self.kinds:
            self.codec.check_texts(request)

    def abort(self, request_id: str) -> None:
        """End a request of the running batch at the next token."""
        self.unwanted.add(request_id)

    def warmup(self) -> None:
        """Run two tokens once: kernels and lazy modules are then in place."""
        ids = np.full((1, 2), self.pad, dtype=np.int64)
        mask = np.ones_like(ids)
        texts = Padded(ids, mask, np.zeros_like(ids))
        with self.running():
            if self.role in (Role.DECODER, Role.SEQ2SEQ):
                self.decoding().prefill(ids, mask)
            elif self.role is Role.CLASSIFIER:
                self.classify(texts)
            if Kind.EMBED in self.kinds:
                self.dimensions = int(self.encode(texts).shape[-1])
