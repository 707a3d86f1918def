"""What a request is made of besides options: text or JSON, from a file or the standard input."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final

import orjson

from producer.batch.streams import STANDARD
from shared.contract import Kind
from shared.errors import BadRequest

INPUTS: Final = frozenset({"prompt", "messages", "texts"})
"""The options that hold what a request works on."""


def input_of(given: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a request with these options.

    ``given`` is a text, or ``-`` for what is on the standard input; that is also read where no option has inputs and
    something is piped in. The text becomes what the kind takes: a prompt, the user's message, or a text to work on.
    Its last line break is left out. Raises :class:`BadRequest` where inputs are given twice, or are not UTF-8.
    """
    named = options.keys() & INPUTS
    if len(named) + (given is not None) > 1:
        raise BadRequest("INPUT, --prompt, --text and --message are one thing: give one of them")
    if options.get("prompt") == STANDARD:
        return {"prompt": _standard_input()}
    if named or (given is None and not _is_piped()):
        return {}
    return _as_kind_takes(_standard_input() if given in (None, STANDARD) else str(given), options)


def _as_kind_takes(text: str, options: Mapping[str, Any]) -> dict[str, Any]:
    kind = options.get("kind") or (Kind.RERANK if "query" in options else Kind.GENERATE)
    if kind is Kind.GENERATE:
        return {"prompt": text}
    if kind is Kind.CHAT:
        return {"messages": [{"role": "user", "content": text}]}
    return {"texts": [text]}


def _is_piped() -> bool:
    """Whether the standard input is a pipe or a file, which ends, and no terminal."""
    if sys.stdin is None:  # it is closed
        return False
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except OSError:  # the process that runs this has none
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def _standard_input() -> str:
    content = sys.stdin.buffer.read()
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise BadRequest(f"the standard input is not UTF-8 text (byte {error.start})") from None
    return text.removesuffix("\n").removesuffix("\r")


def read_object(source: str) -> dict[str, Any]:
    """The JSON object in a file; ``-`` is the standard input. Raises :class:`BadRequest` where there is none."""
    with nullcontext(sys.stdin.buffer) if source == STANDARD else Path(source).open("rb") as stream:
        content = stream.read()
    try:
        data = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"{source} is not JSON: {error.msg} in line {error.lineno}") from None
    if not isinstance(data, dict):
        raise BadRequest(f"{source} does not hold a JSON object")
    return data
