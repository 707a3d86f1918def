"""Dead letters: the messages that were given up, each kept with the reason; to look at, replay and drop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import redis

from shared import keys, wire
from shared.broker import broker_errors, lua
from shared.errors import BadRequest
from shared.settings import FleetSettings

AT_ONCE = 200


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One message that was given up, at ``time`` (seconds since the epoch); ``request_id`` may be unknown (empty)."""

    id: str
    request_id: str
    time: float
    queue: str
    list_name: str
    reason: str
    payload: bytes

    def envelope(self) -> dict[str, Any] | None:
        """The message, where it can be decoded."""
        try:
            return wire.decode_envelope(self.payload)
        except BadRequest:
            return None

    def summary(self) -> dict[str, Any]:
        """What may be shown of it without its inputs."""
        envelope = self.envelope()
        shown: dict[str, Any] = {
            "id": self.id, "request": self.request_id, "time": self.time, "queue": self.queue, "reason": self.reason,
            "bytes": len(self.payload),
        }  # fmt: skip
        if envelope is not None:
            own = wire.own_header(envelope["headers"])
            shown |= {
                "task": envelope["headers"].get("task"),
                "deliveries": own.get("deliveries", 0),
                "hops": own.get("hops", []),
            }
        return shown

    def arguments(self) -> Any:
        """The task's arguments, which hold the request with its inputs; text where they cannot be decoded."""
        envelope = self.envelope()
        try:
            return orjson.loads(envelope["body"]) if envelope is not None else self.payload.decode(errors="replace")
        except orjson.JSONDecodeError:
            return self.payload.decode(errors="replace")


class DeadLetters:
    """The stream of dead letters, the newest first."""

    def __init__(self, client: redis.Redis, fleet: FleetSettings) -> None:
        self._client = client
        self._fleet = fleet
        self._replay = client.register_script(lua("shared", "replay"))

    def __iter__(self) -> Iterator[DeadLetter]:
        """All of them, read as they are wanted."""
        last = "+"
        while True:
            with broker_errors(self._fleet, "read the dead letters"):
                rows: Any = self._client.xrevrange(keys.DEAD_LETTERS, max=last, count=AT_ONCE)
            for entry, fields in rows:
                yield _letter(entry.decode(), fields)
            if len(rows) < AT_ONCE:
                return
            last = f"({rows[-1][0].decode()}"

    def reasons(self) -> Counter[str]:
        """How many there are for each reason."""
        return Counter(letter.reason for letter in self)

    def find(self, names: Sequence[str]) -> list[DeadLetter]:
        """Those with these ids, of letter or request; raise :class:`BadRequest` for one that is not there."""
        wanted = set(names)
        found = [letter for letter in self if wanted & {letter.id, letter.request_id}]
        missing = wanted - {name for letter in found for name in (letter.id, letter.request_id)}
        if missing:
            raise BadRequest(f"there is no dead letter {', '.join(sorted(missing))}; see: muai dead list")
        return found

    def replay(self, letters: Sequence[DeadLetter]) -> int:
        """Put them back on their queues, with a fresh count of deliveries; returns how many were still there."""
        moved = 0
        for first in range(0, len(letters), AT_ONCE):
            arguments: list[str | bytes] = []
            for letter in letters[first : first + AT_ONCE]:
                result = keys.result_key(letter.request_id) if letter.request_id else ""
                arguments += [letter.id, letter.list_name, _renewed(letter), result]
            with broker_errors(self._fleet, "replay dead letters"):
                moved += sum(self._replay(keys=[keys.DEAD_LETTERS, keys.UNDER_WAY], args=arguments))
        return moved

    def drop(self, letters: Sequence[DeadLetter]) -> int:
        """Forget them; returns how many were still there."""
        dropped = 0
        for first in range(0, len(letters), AT_ONCE):
            names = [letter.id for letter in letters[first : first + AT_ONCE]]
            with broker_errors(self._fleet, "drop dead letters"):
                dropped += int(self._client.xdel(keys.DEAD_LETTERS, *names))
        return dropped


def _letter(entry: str, fields: dict[bytes, bytes]) -> DeadLetter:
    payload = fields.get(b"message", b"")
    list_name = fields.get(b"list", b"").decode(errors="replace")
    request_id = ""
    try:
        headers = wire.loads_object(payload).get("headers")
        request_id = str(headers.get("id") or "") if isinstance(headers, dict) else ""
    except BadRequest:
        pass
    return DeadLetter(
        entry, request_id, int(entry.partition("-")[0]) / 1000, keys.queue_of_list(list_name), list_name,
        fields.get(b"reason", b"").decode(errors="replace"), payload,
    )  # fmt: skip


def _renewed(letter: DeadLetter) -> bytes:
    envelope = letter.envelope()
    return letter.payload if envelope is None else wire.amended(envelope, header={"deliveries": 0, "hops": []})
