"""What the broker keeps of a request's end: where the request is, what came of it, and its cancellation."""

from __future__ import annotations

from collections.abc import Sequence

import redis

from producer.client.records import Outcome, RequestStatus, decode_record, outcome_of, status_of
from producer.client.replies import ReplyReader
from shared import keys, wire
from shared.broker import broker_errors, lua
from shared.errors import Cancelled
from shared.settings import FleetSettings


class StoredResults:
    """Asks the broker about single requests; what is found resolves the future of whoever waits for it."""

    def __init__(self, client: redis.Redis, fleet: FleetSettings, replies: ReplyReader) -> None:
        self._client = client
        self._fleet = fleet
        self._replies = replies
        self._cancel = client.register_script(lua("shared", "cancel"))

    def watch(self, request_ids: Sequence[str]) -> None:
        """Look results up now and until they are there: their records go to the client that submitted the requests."""
        with broker_errors(self._fleet, "look up a result"):
            self._replies.watch(self._client, request_ids)

    def status(self, request_id: str) -> RequestStatus:
        """Where a request is."""
        with broker_errors(self._fleet, "ask for a status"):
            record = self._client.get(keys.result_key(request_id))
        return RequestStatus.PENDING if record is None else status_of(decode_record(record))

    def outcome(self, request_id: str) -> Outcome | None:
        """What came of a request; ``None`` where it has not ended, or its record has expired."""
        with broker_errors(self._fleet, "look up a result"):
            record = self._client.get(keys.result_key(request_id))
        if record is None:
            return None
        outcome = outcome_of(decode_record(record))
        if outcome is not None:
            self._replies.resolve(request_id, outcome)
        return outcome

    def cancel(self, request_id: str) -> bool:
        """Cancel a request: its caller gets :class:`~shared.errors.Cancelled`. ``False`` where it had ended before."""
        record = wire.failure_meta(request_id, Cancelled(), status="REVOKED")
        with broker_errors(self._fleet, "cancel"):
            cancelled = self._cancel(
                keys=[keys.result_key(request_id), keys.CANCELLED],
                args=[record, self._fleet.result_expires_seconds],
            )
        if cancelled:
            self._replies.resolve_record(record)
        return bool(cancelled)
