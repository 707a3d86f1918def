"""Which engine a request is submitted to, by a list of the live workers that is read again when it has grown old."""

from __future__ import annotations

import time
from collections.abc import Sequence

from producer.client.steps import Steps, run_script
from shared.broker import broker_errors, lua
from shared.clock import BrokerClock
from shared.contract import EngineName, InferenceRequest
from shared.direct import Script
from shared.errors import NoEngineAvailable
from shared.registry import KEYS, Changes, KnownWorkers, WorkerInfo, changes_of, in_order
from shared.routing import choose, park
from shared.settings import Settings

REFRESH_SECONDS, STALE_SECONDS = 1.0, 3.0
"""How old the list of live workers may be: past the first it is read again after a submission, while the answer is on
its way; past the second no engine is chosen by it."""


class EngineChoice:
    """Chooses engines. Safe to use from several threads. The ``clock`` learns from the broker's answers."""

    def __init__(self, settings: Settings, clock: BrokerClock) -> None:
        self._clock = clock
        self._settings = settings
        self._live = Script.of(lua("shared", "live"))
        self._known = KnownWorkers()
        self._workers: list[WorkerInfo] = []
        self._read_at = float("-inf")
        self._choices: dict[tuple[object, ...], EngineName] = {}

    def live_workers(self) -> Steps[list[WorkerInfo]]:
        """Read the list of live workers; engines are chosen by it from now on."""
        found = yield from self._changes("")
        return self._take(in_order(found.workers))

    def refresh(self) -> Steps[None]:
        """Read the list again where it is not new."""
        if self._older_than(REFRESH_SECONDS):
            yield from self._read()

    def _read(self) -> Steps[None]:
        found = yield from self._changes(self._known.since)
        self._take(self._known.take(found))

    def _changes(self, since: str) -> Steps[Changes]:
        fleet = self._settings.fleet
        asked = self._clock.steady()
        with broker_errors(fleet, "list the workers"):
            answer = yield from run_script(self._live, KEYS, [int(fleet.silent_after_seconds * 1000), since])
        found = changes_of(answer)
        self._clock.learn(found.now, asked, self._clock.steady())
        return found

    def _take(self, workers: list[WorkerInfo]) -> list[WorkerInfo]:
        self._read_at = time.monotonic()
        self._workers = workers
        self._choices.clear()
        return workers

    def engines_for(self, requests: Sequence[InferenceRequest]) -> Steps[list[EngineName]]:
        """The engine to submit each request to; raises as :func:`shared.routing.choose` does.

        A request with a deadline may wait for an engine that no live worker has now.
        """
        if self._older_than(STALE_SECONDS):
            yield from self._read()
        engines = []
        for request in requests:
            key = (request.model, request.kind, request.engine_preference, request.features)
            engine = self._choices.get(key)
            engines.append((yield from self._choose(request, key)) if engine is None else engine)
        return engines

    def _choose(self, request: InferenceRequest, key: tuple[object, ...]) -> Steps[EngineName]:
        try:
            engine = choose(request, self._workers, self._settings)
        except NoEngineAvailable:
            if self._older_than(REFRESH_SECONDS):  # a worker may have come
                yield from self._read()
                return (yield from self._choose(request, key))
            parked = park(request, self._workers, self._settings) if request.deadline is not None else None
            if parked is None:
                raise
            return parked
        self._choices[key] = engine
        return engine

    def _older_than(self, seconds: float) -> bool:
        return time.monotonic() - self._read_at > seconds or self._clock.doubtful
