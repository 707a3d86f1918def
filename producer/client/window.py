"""Submitting many requests with a bounded number of them under way, and their outcomes in order."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Protocol

from producer.client.handle import Handle
from producer.client.records import Outcome
from producer.client.submission import RequestLike
from shared.contract import InferenceResult
from shared.errors import BrokerUnavailable, FleetError, Overloaded

CHUNK = 64
"""Requests that are submitted at once."""

Item = RequestLike | Outcome
"""A request, or the outcome of one that needs no submitting."""


class SubmitMany(Protocol):
    """Submits several requests: all of them or, where one is refused, none."""

    def __call__(self, requests: Sequence[RequestLike], *, timeout: float | None) -> list[Handle]:
        """Submit; ``timeout`` is in seconds."""


class Window:
    """At most ``size`` requests under way. ``timeout`` is each one's, in seconds.

    With ``patient``, a broker that is away is waited for once a request has been submitted.
    """

    def __init__(self, submit_many: SubmitMany, size: int, timeout: float | None, *, patient: bool) -> None:
        self._submit_many = submit_many
        self._size = size
        self._timeout = timeout
        self._patient = patient

    def outcomes(self, items: Iterable[Item]) -> Iterator[Outcome]:
        """Submit what ``items`` yields, which is read as outcomes are taken, and yield the outcomes in its order."""
        source = iter(items)
        under_way: deque[Handle | Outcome] = deque()
        at_once = min(CHUNK, self._size)
        while True:
            if len(under_way) <= self._size - at_once and (chunk := list(islice(source, at_once))):
                under_way.extend(self._submit_chunk(chunk))
            elif under_way:
                first = under_way.popleft()
                yield first.outcome(through_outages=self._patient) if isinstance(first, Handle) else first
            else:
                return

    def _submit_chunk(self, chunk: list[Item]) -> list[Handle | Outcome]:
        requests = [item for item in chunk if not isinstance(item, InferenceResult | FleetError)]
        handles = iter(self._submit_each(requests))
        return [item if isinstance(item, InferenceResult | FleetError) else next(handles) for item in chunk]

    def _submit_each(self, requests: list[RequestLike]) -> list[Handle | FleetError]:
        """A handle for each request, or the error for which it was refused; waits where the fleet is full."""
        handles: list[Handle | FleetError] = []
        pieces = deque([requests] if requests else [])
        while pieces:
            piece = pieces.popleft()
            try:
                handles += self._submit_many(piece, timeout=self._timeout)
            except BrokerUnavailable as error:
                handles += [error] * len(piece)
            except Overloaded as error:
                # There will be room: results are on their way meanwhile. A smaller piece finds it sooner.
                time.sleep(error.retry_after)
                half = (len(piece) + 1) // 2
                pieces.extendleft(part for part in (piece[half:], piece[:half]) if part)
            except FleetError as error:
                if len(piece) == 1:
                    handles.append(error)
                else:  # one of them is bad: by themselves they say which
                    pieces.extendleft([request] for request in reversed(piece))
        return handles
