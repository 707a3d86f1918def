"""What JSON cannot say, though Python's own reader and writer let some of it through."""

from __future__ import annotations

import math
from typing import Any, Final

INTEGERS: Final = range(-(2**63), 2**64)
"""Those that every reader of JSON takes."""


def flaw(value: Any, deepest: int) -> str:
    """What of a value cannot be said in JSON, in words and never with the value; empty where all of it can.

    Lists and objects may be nested ``deepest`` levels deep.
    """
    level: list[Any] = [value]
    for _ in range(deepest + 1):
        inner: list[Any] = []
        for item in level:
            if type(item) is dict:
                if not all(type(key) is str for key in item):
                    return "has a key that is not text"
                inner += item
                inner += item.values()
            elif type(item) is list or type(item) is tuple:
                inner += item
            elif found := _flaw_of_one(item):
                return found
        if not inner:
            return ""
        level = inner
    return f"is nested more than {deepest} deep"


def _flaw_of_one(item: Any) -> str:
    if item is None or type(item) is bool:
        return ""
    if isinstance(item, str):
        return "" if is_unicode(item) else LONE_SURROGATE
    if isinstance(item, int):
        return "" if item in INTEGERS else "has a whole number of more than 64 bits"
    if isinstance(item, float):
        return "" if math.isfinite(item) else "has a number that is not finite"
    return f"has a value of type {type(item).__name__}, which is none of JSON's"


LONE_SURROGATE: Final = "holds half a character (a lone surrogate), which is no Unicode text"


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded: it holds no lone surrogate."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
