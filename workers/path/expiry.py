"""Which requests are not wanted any longer: cancelled, expired, or too late to be answered in time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from shared.contract import InferenceRequest
from shared.errors import DeadlineExceeded
from workers.models.manager import ModelManager
from workers.path.waiting_room import WaitingRoom
from workers.requests.ending import Ending
from workers.requests.inflight import InFlight, State


class Expiry:
    """Judges the requests of one engine. ``revoked`` holds the ids that an operator has revoked on this worker.

    ``another`` is a worker that may still do in time what this one, ``here``, cannot.
    """

    def __init__(
        self,
        models: ModelManager,
        waiting: WaitingRoom,
        revoked: Collection[str],
        here: str,
        another: Callable[[InFlight, InferenceRequest], str | None],
    ) -> None:
        self._models = models
        self._waiting = waiting
        self._revoked = revoked
        self._here = here
        self._another = another

    def unwanted(self, item: InFlight, now: float) -> Ending | None:
        """How a request ends that nobody wants at ``now`` (seconds since the epoch); ``None`` where it is wanted."""
        if (ending := self.late(item, now)) is not None:
            return ending
        request = item.request
        if request is None or request.deadline is None or item.started:
            return None
        takes = self._waiting.least_seconds(request, now)
        if takes is None or not request.expired(now + takes):
            return None
        if (worker := self._another(item, request)) is not None:
            return Ending.passed_on(item, self._here, worker)
        text = f"the deadline cannot be met: such requests take {takes:.3f} s or more"
        return Ending.failed(item, DeadlineExceeded(text))

    def unwanted_among(self, items: Iterable[InFlight], now: float) -> list[Ending]:
        """The same of all that wait."""
        if not self._revoked:
            items = [item for item in items if item.expiring]
        waiting = [item for item in items if item.state is State.WAITING]
        return [ending for item in waiting if (ending := self.unwanted(item, now)) is not None]

    def late(self, item: InFlight, now: float) -> Ending | None:
        """The same, going by nothing but the time."""
        if self._revoked and item.id in self._revoked:
            return Ending.cancelled(item)
        if not item.expiring:
            return None
        expires, request = item.expires, item.request
        if expires is not None and now >= expires and not item.started:
            return Ending.expired(item)
        if request is None or not request.expired(now):
            return None
        failure = self._models.failures().get(request.model)
        return Ending.late(item, *([] if failure is None else [f"{self._models.engine.name}: {failure}"]))
