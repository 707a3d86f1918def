"""Batches on their way through converted models. Caches stay in the runtime's memory from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from workers.engines.common.decoding import Decoding, positions
from workers.engines.common.sampling import ArrayLogits, Logits, Tokens
from workers.engines.onnx.bias import causal_bias, padding_bias
from workers.engines.onnx.files import Conversion


class Running:
    """A session, and where it runs."""

    def __init__(self, session: Any, outputs: Sequence[str]) -> None:
        self._session = session
        self._outputs = list(outputs)
        self._inputs = {item.name for item in session.get_inputs()}
        self._device = "cuda" if "CUDAExecutionProvider" in session.get_providers() else "cpu"

    def value(self, array: NDArray[Any]) -> Any:
        """An array where the session runs."""
        from onnxruntime import OrtValue

        return OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self._device, 0)

    def run(self, feeds: dict[str, Any]) -> list[Any]:
        """One run of the graph: arrays and values by name, those that it does not take left out.

        Outputs stay where it ran, except "out".
        """
        values = {
            name: self.value(given) if isinstance(given, np.ndarray) else given
            for name, given in feeds.items()
            if name in self._inputs
        }
        if self._device == "cpu":
            found: list[Any] = self._session.run_with_ort_values(self._outputs, values)
            return found
        binding = self._session.io_binding()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, "cpu" if name == "out" else self._device)
        self._session.run_with_iobinding(binding)
        bound: list[Any] = binding.get_outputs()
        return bound

    def kept(self, values: Sequence[Any], rows: Sequence[int]) -> list[Any]:
        """Caches of these rows only."""
        return [self.value(value.numpy()[list(rows)]) for value in values]

    def empty(self, conversion: Conversion, rows: int) -> list[Any]:
        """A cache that holds nothing yet."""
        nothing = np.zeros((rows, conversion.kv_heads, 0, conversion.head_size), dtype=np.float32)
        return [self.value(nothing)] * (2 * conversion.layers)


class OnnxDecoding(Decoding):
    """One batch through a converted decoder."""

    def __init__(self, running: Running, conversion: Conversion) -> None:
        self._running = running
        self._conversion = conversion
        self._mask: Tokens = np.empty((0, 0), dtype=np.int64)
        self._next: Tokens = np.empty((0, 1), dtype=np.int64)
        self._past: list[Any] = []

    def prefill(self, ids: Tokens, mask: Tokens) -> Logits:
        """Read the prompts."""
        place = positions(mask)
        self._mask = mask
        self._next = place[:, -1:] + 1
        self._past = self._running.empty(self._conversion, len(ids))
        return self._forward(ids, place)

    def step(self, tokens: Tokens) -> Logits:
        """Append one token to each row."""
        self._mask = np.concatenate([self._mask, np.ones((len(tokens), 1), dtype=np.int64)], axis=1)
        at = self._next
        self._next = at + 1
        return self._forward(tokens[:, None], at)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        self._mask = self._mask[list(rows)]
        self._next = self._next[list(rows)]
        self._past = self._running.kept(self._past, rows)

    def _forward(self, ids: Tokens, place: Tokens) -> Logits:
        feeds = {"ids": ids, "bias": causal_bias(self._mask, ids.shape[1]), "place": place}
        out = self._running.run({**feeds, **dict(zip(self._conversion.past_names, self._past, strict=True))})
        self._past = out[1:]
        return ArrayLogits(out[0].numpy())


class OnnxRewriting(Decoding):
    """One batch through a converted sequence-to-sequence model: its encoder once, then its decoder token by token."""

    padding: ClassVar[Literal["left", "right"]] = "right"

    def __init__(self, encoder: Running, decoder: Running, conversion: Conversion) -> None:
        self._encoder = encoder
        self._decoder = decoder
        self._conversion = conversion
        self._forbidden = list(conversion.forbidden)
        self._mask: Tokens = np.empty((0, 0), dtype=np.int64)
        self._written = 0
        self._past: list[Any] = []
        self._cross: list[Any] = []

    def prefill(self, ids: Tokens, mask: Tokens) -> Logits:
        """Read the texts, and give the decoder what it starts from."""
        self._mask = mask
        self._cross = self._encoder.run({"ids": ids, "bias": padding_bias(mask)})
        self._past = self._decoder.empty(self._conversion, len(ids))
        return self._forward(np.tile(np.array(self._conversion.start, dtype=np.int64), (len(ids), 1)))

    def step(self, tokens: Tokens) -> Logits:
        """Append one token to each row."""
        return self._forward(tokens[:, None])

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        self._mask = self._mask[list(rows)]
        self._past = self._decoder.kept(self._past, rows)
        self._cross = self._decoder.kept(self._cross, rows)

    def _forward(self, ids: Tokens) -> Logits:
        rows, queries = ids.shape
        self._written += queries
        conversion = self._conversion
        feeds = {
            "ids": ids,
            "bias": causal_bias(np.ones((rows, self._written), dtype=np.int64), queries),
            "shown": padding_bias(self._mask, queries),
            **dict(zip(conversion.past_names, self._past, strict=True)),
            **dict(zip(conversion.cross_names, self._cross, strict=True)),
        }
        out = self._decoder.run(feeds)
        self._past = out[1:]
        scores = out[0].numpy()
        if self._forbidden:
            scores = scores.copy()  # the runtime's memory is not ours to write
            scores[:, self._forbidden] = -np.inf
        return ArrayLogits(scores)
