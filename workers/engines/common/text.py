"""Between text and token ids, through the model's own tokenizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from shared.contract import InferenceRequest, Kind
from shared.errors import BadRequest, ContextTooLong, EngineLoadError
from shared.settings import ModelSpec
from workers.engines.common.lengths import Piece
from workers.engines.common.roles import REWRITING

FIRST_LOOK = 6
"""Characters for each token of the context after which it is looked whether a longer text can fit at all."""

CUT_MARGIN = 128
"""Tokens that a text which is cut in a word may have more than it has whole."""

SPECIAL_TOKENS = 16
"""No tokenizer puts more around a text, or a pair of them."""

TEXTS_AT_ONCE = 64
"""Texts that are tokenised together: a tokenizer keeps much beside the ids."""

STOP_MARGIN = 8
"""Tokens beyond a stop string's length that are decoded when looking for it: characters may span tokens."""


class TextCodec:
    """The tokenizer of one model. ``prefixes``, by kind, go in front of texts where the declaration has no prefix."""

    def __init__(self, spec: ModelSpec, max_context: int | None, prefixes: Mapping[Kind, str] | None = None) -> None:
        from transformers import AutoTokenizer

        self._spec = spec
        self._prefixes = prefixes or {}
        self.max_context = max_context
        self._sure = math.inf if max_context is None else FIRST_LOOK * (max_context + CUT_MARGIN)
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(spec.path, trust_remote_code=spec.trust_remote_code)
        except (OSError, ValueError) as error:
            raise EngineLoadError(f"no tokenizer for {spec.name!r} at {spec.path!r}: {first_line(error)}") from error

    def prompts(self, request: InferenceRequest) -> list[list[int]]:
        """What a request gives the model to go on from, as token ids: one prompt, or each text to be rewritten.

        Raises :class:`ContextTooLong` where one does not fit (or, for a prompt, leaves no room for a single token) and
        :class:`BadRequest` where it has no tokens or the model has no chat template.
        """
        if request.kind in REWRITING:
            return [list(piece.ids) for piece in self.encode_texts(request)]
        if request.kind is Kind.CHAT:
            ids = self._encode_chat(request)
        else:
            self._hopeful(request.inputs.prompt or "")
            ids = list(self.tokenizer(request.inputs.prompt)["input_ids"])
        if not ids:
            raise BadRequest("the prompt has no tokens")
        self.check(len(ids), room=1)
        return [ids]

    def _encode_chat(self, request: InferenceRequest) -> list[int]:
        if not getattr(self.tokenizer, "chat_template", None):
            raise BadRequest(f"model {self._spec.name!r} has no chat template; use kind=generate")
        messages = [message.model_dump() for message in request.inputs.messages or ()]
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # the template is the model's own code: whatever it raises is about the messages
            raise BadRequest(f"the model's chat template refuses these messages: {first_line(error)}") from error
        self._hopeful(text)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode_texts(self, request: InferenceRequest) -> list[Piece]:
        """The texts of a request as tokens, the model's prefix before each. None is cut: see :meth:`check`."""
        return self._pieces(*self._read(request))

    def encode_pairs(self, request: InferenceRequest) -> list[Piece]:
        """Each text of a rerank request behind the query, as tokens. None is cut: see :meth:`check`."""
        return self._pieces(*self._read(request))

    def check_texts(self, request: InferenceRequest) -> None:
        """Raise what :meth:`encode_texts` or :meth:`encode_pairs` would, having looked at no text that is sure to fit.

        No text has more tokens than it has bytes.
        """
        if self.max_context is None:
            return
        sure = self.max_context - SPECIAL_TOKENS
        long = [
            row
            for row in zip(*self._read(request), strict=True)
            if sum(len(text.encode(errors="replace")) for text in row) > sure
        ]
        for first in range(0, len(long), TEXTS_AT_ONCE):
            self._pieces(*map(list, zip(*long[first : first + TEXTS_AT_ONCE], strict=True)))

    def _read(self, request: InferenceRequest) -> tuple[list[str], ...]:
        """What a model reads of a request with texts: the texts, or the first and the second texts of its pairs."""
        texts = list(request.inputs.texts or ())
        if request.kind is Kind.RERANK:
            return [request.inputs.query or ""] * len(texts), texts
        prefix = self._spec.prefix if self._spec.prefix is not None else self._prefixes.get(request.kind, "")
        return ([prefix + text for text in texts],)

    def _pieces(self, *texts: list[str]) -> list[Piece]:
        for text in {text for text in chain.from_iterable(texts) if len(text) > self._sure}:
            self._hopeful(text)
        pieces = self.tokenized(*texts)
        for piece in pieces:
            if not piece.ids:
                raise BadRequest("a text has no tokens")
            self.check(len(piece.ids), room=0)
        return pieces

    def _hopeful(self, text: str) -> None:
        """Raise :class:`ContextTooLong` where the beginning of a long text shows that it cannot fit.

        Tokenising all of it would take long; the beginning has about as many tokens as it has in the whole text.
        """
        looked = self._sure
        while self.max_context is not None and len(text) > looked:
            tokens = len(self.tokenizer(text[: int(looked)], add_special_tokens=False)["input_ids"]) - CUT_MARGIN
            if tokens > self.max_context:
                raise self._too_long(f"more than {tokens}", room=False)
            looked *= 2

    def tokenized(self, *texts: list[str]) -> list[Piece]:
        """Texts, or pairs of them, as tokens, of whatever length."""
        found = self.tokenizer(*texts, truncation=False)
        # A tokenizer gives types where its model was trained with them; others see every text as a first one.
        types = found.get("token_type_ids") or [[0] * len(ids) for ids in found["input_ids"]]
        return [Piece(ids, of) for ids, of in zip(found["input_ids"], types, strict=True)]

    def check(self, length: int, room: int) -> None:
        """Raise :class:`ContextTooLong` where ``length`` tokens and ``room`` more do not fit the model."""
        if self.max_context is not None and length + room > self.max_context:
            raise self._too_long(str(length), room=bool(room))

    def _too_long(self, length: str, room: bool) -> ContextTooLong:
        return ContextTooLong(
            f"the input is {length} tokens; the context of {self._spec.name!r} is {self.max_context}"
            + (", which must leave room for an answer" if room else "")
        )

    def decode(self, tokens: list[int]) -> str:
        """Text without special tokens."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def stopped(self, tokens: list[int], stops: tuple[str, ...]) -> str | None:
        """The text before the first stop string, or ``None`` where there is none yet."""
        if not stops:
            return None
        tail = self.decode(tokens[-(max(map(len, stops)) + STOP_MARGIN) :])
        if not any(stop in tail for stop in stops):
            return None
        text = self.decode(tokens)
        cuts = [cut for cut in (text.find(stop) for stop in stops) if cut >= 0]
        return text[: min(cuts)] if cuts else None


def task_prefixes(config: Any) -> dict[Kind, str]:
    """What a transformers configuration puts in front of texts (T5's "summarize: "), where it leaves no choice."""
    tasks: Mapping[str, Any] = getattr(config, "task_specific_params", None) or {}
    found = {}
    for kind, task in ((Kind.SUMMARIZE, "summarization"), (Kind.TRANSLATE, "translation")):
        named = {params.get("prefix", "") for name, params in tasks.items() if name.split("_")[0] == task}
        if len(named) == 1:  # several pairs of languages: the declaration must say which
            found[kind] = str(named.pop())
    return found


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def require_path(spec: ModelSpec) -> None:
    """Raise :class:`EngineLoadError` for a path that looks local and is not there."""
    looks_local = spec.path.startswith((".", "/", "~")) or spec.path.count("/") > 1
    if looks_local and not Path(spec.path).expanduser().exists():
        raise EngineLoadError(
            f"model {spec.name!r}: there is nothing at {spec.path!r}; set models.catalog.{spec.name}.path to a folder "
            "with a transformers model, or to a hub id"
        )
