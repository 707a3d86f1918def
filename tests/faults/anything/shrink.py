"""Makes a failing composition smaller: what it fails without is left out, as long as the same check still fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from tests.faults.anything.composition import Caller, Composition

Fails = Callable[[Composition], bool]


def smaller(made: Composition) -> Iterator[Composition]:
    """Compositions with one thing less, the largest things first."""
    for place in range(len(made.callers)):
        if len(made.callers) > 1:
            yield replace(made, callers=made.callers[:place] + made.callers[place + 1 :])
    for place in range(len(made.faults)):
        yield replace(made, faults=made.faults[:place] + made.faults[place + 1 :])
    for place in reversed(range(len(made.workers))):
        if len(made.workers) > 1 and not any(fault.worker >= len(made.workers) - 1 for fault in made.faults):
            yield replace(made, workers=made.workers[:place] + made.workers[place + 1 :])
    for place, caller in enumerate(made.callers):
        for less in _fewer(caller):
            yield replace(made, callers=(*made.callers[:place], less, *made.callers[place + 1 :]))
    if made.tenants:
        yield replace(made, tenants={})


def _fewer(caller: Caller) -> Iterator[Caller]:
    half = len(caller.asks) // 2
    if half:
        yield replace(caller, asks=caller.asks[:half])
        yield replace(caller, asks=caller.asks[half:])
    for name, plain in (("cancels", 0), ("timeout", None), ("countdown", None), ("expires", None), ("pace", 0.0)):
        if getattr(caller, name) != plain:
            yield replace(caller, **{name: plain})
    plain_asks = tuple(replace(ask, size=8, alphabet="latin", texts=1) for ask in caller.asks)
    if plain_asks != caller.asks:
        yield replace(caller, asks=plain_asks)


def shrunk(made: Composition, fails: Fails, seconds: float) -> Composition:
    """The smallest that was found within so many seconds."""
    until = time.monotonic() + seconds
    while True:
        for candidate in smaller(made):
            if time.monotonic() > until:
                return made
            if fails(candidate):
                made = candidate
                break
        else:
            return made
