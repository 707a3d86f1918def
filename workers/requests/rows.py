"""A request as an engine sees it: rows, which may run in several parts, and whose answers are put together. Pure.

A row is one sequence that a model reads: each text of a request that has texts, the whole of any other. A request with
more rows than a batch holds runs in parts. Its answer is the one that it would have had in one piece.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, Final

from shared import wire
from shared.contract import InferenceRequest, Usage
from workers.engines.base import EngineOutput

if TYPE_CHECKING:
    from workers.requests.inflight import InFlight

BY_ROW: Final = frozenset({"embeddings", "labels", "scores", "texts", "token_ids", "finish_reasons"})
"""The outputs of a request with texts that have an entry for each of them."""


SURE: Final = 0.95
"""Share of the expected length of an answer that it will have: rows of numbers differ little."""


class Part:
    """What of a request runs in one batch: its rows from ``first`` to before ``last``. Equal to itself only.

    ``whole`` says whether that is all of it. ``request`` is what the engine is given: the same, with these texts.
    """

    __slots__ = ("first", "item", "last", "request", "rows", "whole")

    def __init__(self, item: InFlight, rows: Rows, first: int, last: int) -> None:
        self.item = item
        self.rows = rows
        self.first = first
        self.last = last
        self.whole = last - first == len(rows.tokens)
        self.request = rows.request if self.whole else rows.request_of(first, last)

    @property
    def id(self) -> str:
        """The request's id."""
        return self.item.id

    def __len__(self) -> int:
        return self.last - self.first

    @property
    def opens(self) -> bool:
        """Whether it is the first of several parts."""
        return self.first == 0 and not self.whole

    def halves(self) -> tuple[Part, Part]:
        """The same in two."""
        middle = (self.first + self.last) // 2
        return (Part(self.item, self.rows, self.first, middle), Part(self.item, self.rows, middle, self.last))


class Rows:
    """The rows of a request that is to run, the longest first: what does not fit shows in the first part.

    ``tokens`` are those that each takes, prompt and completion, in that order; ``read`` are the characters of them all.
    Requests that are ``like`` this one take about as long. ``ran_ms`` and ``batch_size`` are of the parts that were
    answered: for how long they ran, and beside how many others at the most.
    """

    __slots__ = (
        "_answered", "_bytes", "_order", "batch_size", "left", "like", "ran_ms", "read", "request", "tokens",
    )  # fmt: skip

    def __init__(self, request: InferenceRequest, tokens: Sequence[int], read: int = 0, like: Hashable = None) -> None:
        self.request = request
        self.read = read
        self.like = like
        self._order: Sequence[int] = range(len(tokens))
        if len(tokens) > 1:
            lengths = [len(text.encode(errors="replace")) for text in request.inputs.texts or ()]
            self._order = sorted(self._order, key=lambda row: -lengths[row])
            tokens = [tokens[row] for row in self._order]
        self.tokens = tokens
        self.ran_ms = 0.0
        self.batch_size = 0
        self.left = len(tokens)
        """Rows without an answer."""
        self._answered: list[tuple[Part, EngineOutput]] = []
        self._bytes = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def request_of(self, first: int, last: int) -> InferenceRequest:
        """The request with some of its texts only."""
        texts = self.request.inputs.texts or ()
        given = tuple(texts[row] for row in self._order[first:last])
        return self.request.model_copy(update={"inputs": self.request.inputs.model_copy(update={"texts": given})})

    def answer(self, part: Part, output: EngineOutput, ran_ms: float, batch_size: int) -> EngineOutput | None:
        """Take a part's answer; the whole one where it was the last, ``None`` before."""
        self.ran_ms += ran_ms
        self.batch_size = max(batch_size, self.batch_size)
        if part.whole:
            return output
        self.left -= len(part)
        self._answered.append((part, output))
        if self.left:
            self._bytes += len(wire.dumps([output.outputs[name] for name in BY_ROW if name in output.outputs]))
            return None
        return self._joined()

    def expected_bytes(self) -> int:
        """How long the whole answer will be, going by what there is of it; where it is written freely, that alone."""
        if self.request.generates:
            return self._bytes
        return int(SURE * self._bytes * len(self) / max(1, len(self) - self.left))

    def _joined(self) -> EngineOutput:
        outputs = [output for _, output in self._answered]
        first = outputs[0].outputs
        found = {name: self._sorted(name) for name in first if name in BY_ROW}
        if "order" in first:
            found["order"] = sorted(range(len(self)), key=lambda row: -found["scores"][row])
        if "text" in first:
            found["text"] = found["texts"][0]
        return EngineOutput(
            {name: found.get(name, value) for name, value in first.items()},
            Usage(
                prompt_tokens=sum(output.usage.prompt_tokens for output in outputs),
                completion_tokens=sum(output.usage.completion_tokens for output in outputs),
            ),
            prefill_ms=sum(output.prefill_ms for output in outputs),
            decode_ms=sum(output.decode_ms for output in outputs),
            cache_hit=any(output.cache_hit for output in outputs),
            metadata={name: value for output in outputs for name, value in output.metadata.items()},
        )

    def _sorted(self, name: str) -> list[Any]:
        """An output's entries in the order of the texts."""
        entries: list[Any] = [None] * len(self)
        for part, output in self._answered:
            for row, entry in zip(self._order[part.first : part.last], output.outputs[name], strict=True):
                entries[row] = entry
        return entries
