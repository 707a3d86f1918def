"""What becomes of a request that the engine has reported on: its answer, another try, another engine, or its error.

The whole way is in ``docs/life-of-a-request.md``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from shared import wire
from shared.errors import AnswerTooLarge, EngineError, FleetError
from shared.limits import LimitsInForce
from workers.ends.settler import frames
from workers.engines.base import EngineOutput
from workers.path.results import result_of
from workers.path.runner import Finished
from workers.path.waiting_room import WaitingRoom
from workers.requests.ending import Ending
from workers.requests.inflight import InFlight
from workers.routing.fallback import Fallback

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pause:
    """The request is tried again here after so many seconds."""

    seconds: float


class Conclusion:
    """Decides for the requests of one engine."""

    def __init__(
        self,
        fallback: Fallback,
        waiting: WaitingRoom,
        limits: LimitsInForce,
        worker_id: str,
        clock: Callable[[], float],
    ) -> None:
        self._fallback = fallback
        self._waiting = waiting
        self._limits = limits
        self._worker_id = worker_id
        self._clock = clock

    def of(self, done: Finished, *, stopping: bool) -> Ending | Pause | None:
        """How a request goes on or ends; the engine of a ``stopping`` worker may go before it.

        ``None``: other parts of it are still to run.
        """
        item = done.item
        try:
            return self._decide(item, done, stopping)
        except FleetError as error:
            return Ending.failed(item, error)
        except Exception as error:  # noqa: BLE001  # the boundary: what cannot be written is its own request's failure
            # Its text may quote what the engine was given or has answered.
            name, engine = type(error).__name__, self._fallback.engine
            logger.error("the outcome of request %s cannot be written: %s\n%s", item.id, name, frames(error))
            return Ending.failed(item, EngineError(f"the {engine} engine's answer cannot be written: {name}"))

    def _decide(self, item: InFlight, done: Finished, stopping: bool) -> Ending | Pause | None:
        outcome = done.outcome
        if isinstance(outcome, EngineOutput):
            return self._answered(item, done, outcome)
        if stopping and (outcome.transient or outcome.outage):
            return Ending.given_back(item)  # that says nothing of the request
        if outcome.transient and (pause := self._pause(item)) is not None:
            name = type(outcome).__name__
            logger.info("request %s is tried again in %.0f ms: %s", item.id, pause.seconds * 1000, name)
            return pause
        if outcome.hops and item.request is not None and self._limits.now.fallback_on_error:
            decision = self._fallback.after_failure(item.request, item.hops, outcome)
            return self._fallback.carried_out(decision, item, self._clock())
        return Ending.failed(item, outcome)

    def _answered(self, item: InFlight, done: Finished, part: EngineOutput) -> Ending | None:
        rows = done.part.rows
        output = rows.answer(done.part, part, done.ran_ms, done.batch_size)
        if output is None:
            self._kept(rows.expected_bytes(), "will be about")  # before the rest of it has run
            return None
        now = self._clock()
        self._waiting.answered(rows, output.usage.prompt_tokens, item.started, now)
        result = result_of(item, rows, output, self._fallback.engine, self._worker_id, now)
        encoded = wire.dumps(result)
        self._kept(len(encoded), "is")
        return Ending.answered(item, result, encoded, now - item.started)

    def _kept(self, size: int, how: str) -> None:
        """Raise :class:`AnswerTooLarge` where so many bytes are more than are kept."""
        most = self._limits.now.max_result_bytes
        if size > most:
            raise AnswerTooLarge(
                f"the answer {how} {size} bytes; at most {most} are kept (fleet.max_result_bytes): ask for less"
            )

    def _pause(self, item: InFlight) -> Pause | None:
        """How long to wait before another try; ``None`` where it has had enough, or has no time for one."""
        retry = self._limits.now.retry
        pause = retry.backoff_ms / 1000 * 2**item.attempts
        deadline = item.request.deadline if item.request is not None else None
        if item.attempts >= retry.attempts or (deadline is not None and self._clock() + pause >= deadline):
            return None
        return Pause(pause)
