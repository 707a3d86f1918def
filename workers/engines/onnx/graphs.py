"""Models as functions of plain tensors, and their export by ``torch.onnx.export(dynamo=True)``.

A decoder is one graph, an encoder (with or without a classification head) another. A sequence-to-sequence model is two:
what the encoder has read reaches the decoder as the keys and values of the cross attention, computed once a text.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from shared.errors import EngineLoadError
from workers.engines.onnx.files import Conversion, cache_names

FREE = torch.export.Dim.DYNAMIC
ROWS, QUERIES, CACHED, SOURCE = 2, 3, 5, 7
"""Sizes that a graph is traced with; they only must differ, and be none that a tracer takes for special (0 and 1)."""

EXPORTERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
"""Whose warnings are not shown."""

Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of each layer, of shape (rows, heads, tokens, size)."""


class Graph(ABC):
    """One graph: inputs by name with a sample and its free dimensions, what it computes, and its outputs' names."""

    def __init__(self, model: Any, conversion: Conversion) -> None:
        self.model = model
        self.conversion = conversion

    @abstractmethod
    def inputs(self) -> dict[str, tuple[torch.Tensor, tuple[int, ...]]]:
        """A sample of each input, and which of its dimensions are free."""

    @abstractmethod
    def outputs(self) -> list[str]:
        """The names of what :meth:`call` gives."""

    @abstractmethod
    def call(self, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Run the model."""

    def export(self, path: Path) -> None:
        """Write the graph; raises whatever the exporter raises."""
        call = self.call
        named = self.inputs()
        names = list(named)

        class Exported(torch.nn.Module):
            def __init__(self, model: Any) -> None:
                super().__init__()
                self.model = model

            def forward(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
                return call(dict(zip(names, tensors, strict=True)))

        shapes = [dict.fromkeys(free, FREE) for _, free in named.values()]
        program = torch.onnx.export(
            Exported(self.model).eval(), ([sample for sample, _ in named.values()],), dynamo=True,
            dynamic_shapes=(shapes,), opset_version=opset(quantised=self.conversion.quantised), verbose=False,
            input_names=names, output_names=self.outputs(),
        )  # fmt: skip
        if program is None:
            raise EngineLoadError("the exporter returned nothing")
        program.save(str(path))

    def cache(self, prefix: str, tokens: int) -> dict[str, tuple[torch.Tensor, tuple[int, ...]]]:
        """Inputs that hold a key-value cache."""
        shape = (ROWS, self.conversion.kv_heads, tokens, self.conversion.head_size)
        return {name: (torch.randn(shape), (0, 2)) for name in cache_names(prefix, self.conversion.layers)}

    def held(self, inputs: dict[str, torch.Tensor], prefix: str) -> DynamicCache:
        """A cache of transformers with what the inputs hold."""
        cache = DynamicCache()
        for layer in range(self.conversion.layers):
            cache.update(inputs[f"{prefix}.{layer}.key"], inputs[f"{prefix}.{layer}.value"], layer)
        return cache


class DecoderGraph(Graph):
    """Prompt or next token, and the cache, to the scores of the token after it, and the cache."""

    def inputs(self) -> dict[str, tuple[torch.Tensor, tuple[int, ...]]]:
        """Tokens, bias, positions and cache."""
        return {
            "ids": (torch.ones(ROWS, QUERIES, dtype=torch.long), (0, 1)),
            "bias": (torch.zeros(ROWS, 1, QUERIES, CACHED + QUERIES), (0, 2, 3)),
            "place": (torch.arange(CACHED, CACHED + QUERIES).repeat(ROWS, 1), (0, 1)),
            **self.cache("past", CACHED),
        }

    def outputs(self) -> list[str]:
        """Scores and cache."""
        return ["out", *self.conversion.present_names]

    def call(self, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Run the model."""
        out = self.model(
            input_ids=inputs["ids"], attention_mask=inputs["bias"], position_ids=inputs["place"],
            past_key_values=self.held(inputs, "past"), use_cache=True,
        )  # fmt: skip
        return [out.logits[:, -1], *_tensors(out.past_key_values)]


class TextGraph(Graph):
    """Texts to token vectors, or to the scores of a classification head."""

    def inputs(self) -> dict[str, tuple[torch.Tensor, tuple[int, ...]]]:
        """Those of tokens, types, bias and positions that the model takes."""
        taken = inspect.signature(self.model.forward).parameters
        place = (torch.arange(QUERIES).repeat(ROWS, 1) + self.conversion.first_position, (0, 1))
        return {
            "ids": (torch.ones(ROWS, QUERIES, dtype=torch.long), (0, 1)),
            "bias": (torch.zeros(ROWS, 1, QUERIES, QUERIES), (0, 2, 3)),
            **({"place": place} if "position_ids" in taken else {}),
            **({"types": (torch.zeros_like(place[0]), (0, 1))} if "token_type_ids" in taken else {}),
        }

    def outputs(self) -> list[str]:
        """Vectors or scores."""
        return ["out"]

    def call(self, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Run the model."""
        names = {"ids": "input_ids", "bias": "attention_mask", "place": "position_ids", "types": "token_type_ids"}
        out = self.model(**{names[name]: tensor for name, tensor in inputs.items()})
        return [out.logits if self.conversion.labels is not None else out.last_hidden_state]


class ReadingGraph(Graph):
    """Texts to the keys and values of a sequence-to-sequence decoder's cross attention.

    The decoder runs on one token to have them computed. Of it, only what leads to them is kept in the graph.
    """

    def inputs(self) -> dict[str, tuple[torch.Tensor, tuple[int, ...]]]:
        """Tokens and bias."""
        return {
            "ids": (torch.ones(ROWS, SOURCE, dtype=torch.long), (0, 1)),
            "bias": (torch.zeros(ROWS, 1, SOURCE, SOURCE), (0, 2, 3)),
        }

    def outputs(self) -> list[str]:
        """The cross attention's cache."""
        return self.conversion.cross_names

    def call(self, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Run the encoder, and the decoder's projections of what it says."""
        ids, bias = inputs["ids"], inputs["bias"]
        read = self.model.get_encoder()(input_ids=ids, attention_mask=bias).last_hidden_state
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        out = self.model(
            encoder_outputs=(read,), attention_mask=bias[:, :, :1], decoder_input_ids=ids[:, :1],
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        return _tensors(out.past_key_values.cross_attention_cache)


class WritingGraph(Graph):
    """A sequence-to-sequence decoder: tokens and both caches to the scores of the token after, and the own cache."""

    def inputs(self) -> dict[str, tuple[torch.Tensor, tuple[int, ...]]]:
        """Tokens, the bias of the self attention and that of the cross attention, and both caches."""
        return {
            "ids": (torch.ones(ROWS, QUERIES, dtype=torch.long), (0, 1)),
            "bias": (torch.zeros(ROWS, 1, QUERIES, CACHED + QUERIES), (0, 2, 3)),
            "shown": (torch.zeros(ROWS, 1, QUERIES, SOURCE), (0, 2, 3)),
            **self.cache("past", CACHED),
            **self.cache("cross", SOURCE),
        }

    def outputs(self) -> list[str]:
        """Scores and the self attention's cache."""
        return ["out", *self.conversion.present_names]

    def call(self, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Run the decoder."""
        cross = self.held(inputs, "cross")
        cache = EncoderDecoderCache(self.held(inputs, "past"), cross)
        # What the encoder said is in the cache; the decoder only asks for its shape.
        rows, _, source, _ = inputs["cross.0.key"].shape
        read = inputs["shown"].new_zeros(rows, source, self.model.config.hidden_size)
        out = self.model(
            encoder_outputs=(read,), attention_mask=inputs["shown"], decoder_input_ids=inputs["ids"],
            decoder_attention_mask=inputs["bias"], past_key_values=cache, use_cache=True,
        )  # fmt: skip
        return [out.logits[:, -1], *_tensors(out.past_key_values.self_attention_cache)]


def opset(*, quantised: bool) -> int:
    """The version of the operators: 20 has GELU as one, 23 attention as well.

    Not every runtime has a kernel for that, and the quantiser writes graphs of that version that are not valid.
    """
    import onnxruntime

    release = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
    on_a_cpu = "CUDAExecutionProvider" not in onnxruntime.get_available_providers()
    return 23 if release >= (1, 23) and on_a_cpu and not quantised else 20


def cache_shape(model: Any, start: tuple[int, ...]) -> tuple[int, int, int]:
    """Layers, heads and head size of the cache, as the model itself makes it; ``start``: of a seq2seq decoder's."""
    one = torch.ones(1, 1, dtype=torch.long)
    inputs = {"input_ids": one, **({"decoder_input_ids": one * start[0]} if start else {})}
    cache = model(**inputs, use_cache=True).past_key_values
    layers = (cache.self_attention_cache if start else cache).layers
    _, heads, _, size = layers[0].keys.shape
    return len(layers), int(heads), int(size)


def _tensors(cache: DynamicCache) -> list[torch.Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def quieten() -> None:
    """Exporters warn about everything they decide; what matters is whether the outcome validates.

    Only what they say themselves is dropped, in whichever thread: the worker's own warnings go on.
    """
    for name in EXPORTERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger().addFilter(_not_of_the_quantiser)
    warnings.filterwarnings("ignore", module=rf"({'|'.join(EXPORTERS)}|transformers|copyreg)\b")


def _not_of_the_quantiser(record: logging.LogRecord) -> bool:
    """Whether a record may pass: ONNX Runtime's quantiser speaks through the root logger."""
    return record.levelno >= logging.ERROR or "onnxruntime" not in record.pathname
