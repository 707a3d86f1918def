"""What may be said of an engine's error: libraries quote what they were given, and inputs belong in no log or event.

A text that shares a run of letters and digits with a request's inputs is withheld; every other text is passed on, for
it is what an operator needs. Spaces, punctuation and case do not count, so that escapes and quotation marks hide
nothing.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable, Iterator
from typing import TypeVar

import orjson

from shared.contract import InferenceRequest
from shared.errors import FleetError

RUN = 16
"""Letters and digits in a row that make a quotation."""

WHOLE = 8
"""An input that is shorter than a run, but has this many, counts where the text has all of it."""

FEW_RUNS = 256
"""Runs that are looked for one by one, which is quicker for so many than to look at each place of a long input."""

WITHHELD = "its text quotes a request's inputs and is withheld"

_OTHERS = re.compile(r"[\W_]+")

AnError = TypeVar("AnError", bound=FleetError)


def told(error: BaseException, requests: Iterable[InferenceRequest]) -> str:
    """An exception of a library, as text that may leave the worker."""
    text = WITHHELD if quotes(str(error), requests) else str(error)
    return f"{type(error).__name__}: {text}"


def discreet(error: AnError, requests: Iterable[InferenceRequest]) -> AnError:
    """The error, or one of its class without its text where that quotes the requests."""
    return type(error)(f"{type(error)().message} ({WITHHELD})") if quotes(str(error), requests) else error


def traceback_of(error: BaseException, requests: Iterable[InferenceRequest]) -> str:
    """Where an exception comes from, with its text and its causes' where they do not quote the requests."""
    full = "".join(traceback.format_exception(error))
    if not quotes(full, requests):
        return full
    return "".join(traceback.format_tb(error.__traceback__)) + f"{type(error).__name__}: {WITHHELD}"


def quotes(text: str, requests: Iterable[InferenceRequest]) -> bool:
    """Whether ``text`` has something of the requests' inputs in it."""
    plain = _plain(text)
    runs = {plain[at : at + RUN] for at in range(len(plain) - RUN + 1)}
    for request in requests:
        for value in _inputs(request):
            given = _plain(value)
            if len(given) < RUN:
                if len(given) >= WHOLE and given in plain:
                    return True
            elif _shares(runs, given):
                return True
    return False


def _shares(runs: set[str], given: str) -> bool:
    if len(runs) <= FEW_RUNS:
        return any(run in given for run in runs)
    return any(given[at : at + RUN] in runs for at in range(len(given) - RUN + 1))


def _plain(text: str) -> str:
    return _OTHERS.sub("", text).casefold()


def _inputs(request: InferenceRequest) -> Iterator[str]:
    inputs = request.inputs
    yield inputs.prompt or ""
    yield inputs.query or ""
    yield from inputs.texts or ()
    yield from request.params.stop
    for message in inputs.messages or ():
        yield message.content
    if request.params.json_schema is not None:
        yield orjson.dumps(request.params.json_schema).decode()
