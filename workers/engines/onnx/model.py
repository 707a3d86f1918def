"""A converted model in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shared.errors import EngineError, EngineOutOfMemory
from shared.settings import ModelSpec
from workers.engines.common.decoding import Decoding, positions
from workers.engines.common.lengths import Floats, Padded
from workers.engines.common.roles import Role
from workers.engines.common.text import TextCodec, first_line
from workers.engines.common.transformer import TransformerModel
from workers.engines.onnx.bias import pack, padding_bias
from workers.engines.onnx.decoding import OnnxDecoding, OnnxRewriting, Running
from workers.engines.onnx.files import ENCODER_GRAPH, GRAPH, Conversion

Open = Callable[[Path], Any]
"""Opens a session on a graph."""


class OnnxModel(TransformerModel):
    """A converted model in memory."""

    def __init__(self, spec: ModelSpec, folder: Path, conversion: Conversion, open_graph: Open) -> None:
        self.spec = spec
        self.role = conversion.role
        self.kinds = frozenset(spec.kinds) & conversion.kinds
        self.conversion = conversion
        self.precision = "int8" if conversion.quantised else "float32"
        self.notes = (conversion.told,) if conversion.quantised else ()
        self.unwanted = set()
        self.codec = TextCodec(spec, conversion.max_context, dict(conversion.prefixes))
        self.max_context = conversion.max_context
        self.memory_bytes = sum(file.stat().st_size for file in folder.iterdir())
        self.labels = conversion.labels
        self.eos = frozenset(conversion.eos)
        self.pad = conversion.pad
        writes = conversion.role in (Role.DECODER, Role.SEQ2SEQ)
        self._main = Running(open_graph(folder / GRAPH), ["out", *(conversion.present_names if writes else ())])
        self._encoder: Running | None = None
        if conversion.role is Role.SEQ2SEQ:
            self._encoder = Running(open_graph(folder / ENCODER_GRAPH), conversion.cross_names)

    @contextmanager
    def running(self) -> Iterator[None]:
        """ONNX Runtime's errors, which derive from RuntimeError, as the fleet's."""
        try:
            yield
        except RuntimeError as error:
            text = first_line(error)
            if "Failed to allocate memory" in text or "out of memory" in text.lower():
                raise EngineOutOfMemory(text) from error
            raise EngineError(f"onnxruntime: {text}") from error

    def decoding(self) -> Decoding:
        """A new batch of a decoder or of a sequence-to-sequence model."""
        if self._encoder is not None:
            return OnnxRewriting(self._encoder, self._main, self.conversion)
        return OnnxDecoding(self._main, self.conversion)

    def encode(self, texts: Padded) -> Floats:
        """Token vectors of the last layer."""
        if not self.conversion.packs:
            return self._run(texts)
        packed = pack(texts, self.pad)
        place = packed.place + self.conversion.first_position
        found = self._main.run({"ids": packed.ids, "types": packed.types, "place": place, "bias": packed.bias()})
        return packed.unpacked(found[0].numpy(), texts.mask)

    def classify(self, texts: Padded) -> Floats:
        """The classification head's scores."""
        return self._run(texts)

    def close(self) -> None:
        """Let the sessions go."""
        del self._main, self._encoder

    def _run(self, texts: Padded) -> Floats:
        place = positions(texts.mask) + self.conversion.first_position
        feeds = {"ids": texts.ids, "types": texts.types, "place": place, "bias": padding_bias(texts.mask)}
        found: Floats = self._main.run(feeds)[0].numpy()
        return found
