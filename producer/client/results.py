"""What the broker keeps of a request's end: where the request is, what came of it, and its cancellation."""

from __future__ import annotations

from typing import Any

from producer.client.awaited import Awaited
from producer.client.records import Outcome, RequestStatus, decode_record, outcome_of, status_of
from producer.client.steps import Command, Steps, run_script
from producer.client.submission import checked_id
from shared import keys, wire
from shared.broker import broker_errors, lua
from shared.direct import Script
from shared.errors import Cancelled
from shared.settings import FleetSettings


class StoredResults:
    """Asks the broker about single requests; what is found resolves the futures of those who wait for it."""

    def __init__(self, fleet: FleetSettings, awaited: Awaited[Any]) -> None:
        self._fleet = fleet
        self._awaited = awaited
        self._cancel = Script.of(lua("shared", "cancel"))

    def status(self, request_id: str) -> Steps[RequestStatus]:
        """Where a request is."""
        with broker_errors(self._fleet, "ask for a status"):
            record = yield Command(("GET", keys.result_key(checked_id(request_id))))
        return RequestStatus.PENDING if record is None else status_of(decode_record(record))

    def outcome(self, request_id: str) -> Steps[Outcome | None]:
        """What came of a request; ``None`` where it has not ended, or its record has expired."""
        with broker_errors(self._fleet, "look up a result"):
            record = yield Command(("GET", keys.result_key(checked_id(request_id))))
        if record is None:
            return None
        outcome = outcome_of(decode_record(record))
        if outcome is not None:
            self._awaited.resolve(request_id, outcome)
        return outcome

    def cancel(self, request_id: str) -> Steps[bool]:
        """Cancel a request: its caller gets :class:`~shared.errors.Cancelled`. ``False`` where it had ended before."""
        record = wire.failure_meta(request_id, Cancelled(), status="REVOKED")
        with broker_errors(self._fleet, "cancel"):
            cancelled = yield from run_script(
                self._cancel,
                [keys.result_key(checked_id(request_id)), keys.CANCELLED],
                [record, self._fleet.result_expires_seconds, keys.CANCELLED_SECONDS],
            )
        if cancelled:
            self._awaited.resolve_record(record)
        return bool(cancelled)
