"""What was asked and what came of it, noted outside the system: the evidence that a fault lost or doubled nothing.

Two append-only files. In the ledger's own each line is one event: an id was accepted (with the answer it ought to get),
went on to the next engine, or got a terminal record, as the broker tells whoever listens to its results. In the other
the workers' engines note what they run (:mod:`tests.faults.worker`).
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import orjson
import redis

from shared.keys import result_key

TERMINAL = {"SUCCESS", "FAILURE", "REVOKED"}
ALL_RESULTS = result_key("*")
LOOK_AT_ONCE = 500


class Execution(NamedTuple):
    """One run of one request: its id, the engine, the worker's process, and when it began (seconds since the epoch).

    ``batch`` is how many ran with it, itself included.
    """

    id: str
    engine: str
    pid: int
    began: float
    batch: int = 1


class Ended(NamedTuple):
    """A terminal record: the answer (``!`` and the error's name for a failure) and when it came."""

    answer: str
    at: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """The classification of every accepted id."""

    accepted: int
    lost: list[str]
    """No terminal record."""
    doubled: list[str]
    """More than one terminal record."""
    unexpected: dict[str, str]
    """A wrong answer or error, by id."""


class Ledger:
    """Listens while its block lasts. Follows the broker at ``url`` through restarts.

    The broker tells a listener of each record once; what is written while the listener is away is found by looking at
    the ids that are still open.
    """

    def __init__(self, folder: Path, url: str) -> None:
        self.executions_file = folder / "executions.log"
        self.executions_file.touch()
        self.accepted: dict[str, float] = {}
        self.records: dict[str, list[Ended]] = {}
        self.hops: Counter[str] = Counter()
        self._expected: dict[str, str] = {}
        self._looked_up: dict[str, bytes] = {}
        self._executions: list[Execution] = []
        self._read = 0
        self._file = (folder / "ledger.log").open("a")
        self._lock = threading.Lock()
        self._redis = redis.Redis.from_url(url, socket_timeout=20, socket_connect_timeout=2)
        self._listening = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="ledger", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._listening.wait(10):
            raise RuntimeError("the ledger cannot listen to the broker")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join()
        self._redis.close()
        self._file.close()

    # -- notes ------------------------------------------------------------------------------------------------------

    def accept(self, expected: Mapping[str, str]) -> None:
        """The system has accepted these ids; each ought to get this answer."""
        now = time.time()
        with self._lock:
            for request_id, answer in expected.items():
                self.accepted[request_id] = now
                self._expected[request_id] = answer
                self._note("accepted", request_id, now, answer)

    def _heard(self, record: bytes) -> None:
        """The broker tells of a record."""
        data = orjson.loads(record)
        request_id = data["task_id"]
        with self._lock:
            if data["status"] not in TERMINAL:
                self.hops[request_id] += 1
                self._note("hopped", request_id, time.time(), "")
            elif self._looked_up.pop(request_id, None) != record:
                self._end(request_id, data)

    def _found(self, record: bytes) -> None:
        """A record is stored of which the broker has not told, or not yet."""
        data = orjson.loads(record)
        request_id = data["task_id"]
        with self._lock:
            if data["status"] in TERMINAL and request_id not in self.records:
                self._looked_up[request_id] = record
                self._end(request_id, data)

    def _end(self, request_id: str, data: Mapping[str, Any]) -> None:
        ended = Ended(answer_of(data), time.time())
        self.records.setdefault(request_id, []).append(ended)
        self._note("ended", request_id, ended.at, ended.answer)

    def _note(self, event: str, request_id: str, at: float, answer: str) -> None:
        self._file.write(json.dumps([event, request_id, round(at, 4), answer]) + "\n")

    def _listen(self) -> None:
        while not self._closed.is_set():
            listener = self._redis.pubsub(ignore_subscribe_messages=True)
            try:
                listener.psubscribe(ALL_RESULTS)
                listener.get_message(timeout=5)
                self._listening.set()
                self.look()
                while not self._closed.is_set():
                    message = listener.get_message(timeout=0.2)
                    if message is not None:
                        self._heard(message["data"])
            except (redis.RedisError, OSError):
                self._closed.wait(0.01)
            finally:
                listener.close()

    # -- questions --------------------------------------------------------------------------------------------------

    def open(self) -> list[str]:
        """Ids that were accepted and have no terminal record, as far as was heard."""
        with self._lock:
            return [request_id for request_id in self.accepted if request_id not in self.records]

    def look(self) -> list[str]:
        """The same, once the records of the open ids were looked up where they are stored."""
        left = self.open()
        for first in range(0, len(left), LOOK_AT_ONCE):
            for record in self._redis.mget([result_key(one) for one in left[first : first + LOOK_AT_ONCE]]):
                if record is not None:
                    self._found(record)
        return self.open()

    def ended_at(self, request_id: str) -> float | None:
        """When the id got its first terminal record."""
        with self._lock:
            records = self.records.get(request_id)
            return records[0].at if records else None

    def latencies(self, request_ids: Iterable[str] | None = None) -> list[float]:
        """Seconds from acceptance to the first terminal record, in order of acceptance."""
        with self._lock:
            chosen = list(self.accepted) if request_ids is None else list(request_ids)
            return [self.records[one][0].at - self.accepted[one] for one in chosen if one in self.records]

    def executions(self) -> list[Execution]:
        """What was run so far, in order."""
        with self._lock:
            with self.executions_file.open("rb") as notes:
                notes.seek(self._read)
                fresh = notes.read()
            whole = fresh[: fresh.rfind(b"\n") + 1]
            self._read += len(whole)
            for line in whole.decode().splitlines():
                request_id, engine, pid, began, batch = line.rsplit(" ", 4)
                self._executions.append(Execution(request_id, engine, int(pid), float(began), int(batch)))
            return list(self._executions)

    def runs(self, engine: str | None = None) -> Counter[str]:
        """How often each id was run."""
        return Counter(run.id for run in self.executions() if engine in (None, run.engine))

    def runs_by_worker(self) -> Counter[int]:
        """How many requests each process has run."""
        return Counter(run.pid for run in self.executions())

    def verdict(self) -> Verdict:
        """The classification, as of now."""
        with self._lock:
            self._file.flush()
            answers = {one: self.records.get(one, []) for one in self.accepted}
        return Verdict(
            accepted=len(answers),
            lost=[one for one, records in answers.items() if not records],
            doubled=[one for one, records in answers.items() if len(records) > 1],
            unexpected={
                one: records[0].answer
                for one, records in answers.items()
                if records and records[0].answer != self._expected[one]
            },
        )


def answer_of(record: Mapping[str, Any]) -> str:
    """The text that a result record carries, or ``!`` and the name of its error."""
    result = record["result"]
    if record["status"] == "SUCCESS":
        return text_of(result["outputs"])
    return f"!{result['exc_type']}"


def text_of(outputs: Mapping[str, Any]) -> str:
    """An answer as text: the text that it holds, or all of it where it is of vectors and scores."""
    if set(outputs) >= {"text", "finish_reason"}:
        return str(outputs["text"])
    return orjson.dumps(outputs, option=orjson.OPT_SORT_KEYS).decode()
