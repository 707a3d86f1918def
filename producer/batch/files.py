"""Batch files: a request on each line of one file, its answer on a line of another.

What an input line becomes, how a later run recognises it, and what the lines of the answer file say. No broker here.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson

from producer.batch.streams import Sink
from producer.client.records import Outcome
from producer.client.shorthand import complete
from shared.contract import InferenceRequest, Kind
from shared.errors import BadRequest, FleetError, PayloadTooLarge
from shared.identity import id_in_fleet

_OWN_ID = re.compile(r"[0-9a-f]{8}-([0-9a-f]{32})")
_DIGEST = re.compile(r"[0-9a-f]{32}")
_DIGEST_BYTES = 16
_LONGEST_LABEL = 48
"""Characters of a line's own id that stand in that of its request; a longer one is digested."""

_UNCHECKED = 1
"""Stands for a line that was answered by 0.1.0 and has an id of its own: there is no digest to compare."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the input: its number (from 1), and the request or what is wrong with it.

    ``label`` is the line's own id, empty where it has none, and ``id`` what its answer names: the label or the
    request's id. ``digest`` stands for the content without the label, so that a later run notices when it has changed.
    """

    number: int
    id: str
    content: InferenceRequest | BadRequest
    digest: bytes
    label: str = ""
    custom: bool = False


@dataclass(slots=True)
class Answers:
    """What an answer file holds: which lines are answered, and how many of them with an error, by type."""

    digests: array[int] = field(default_factory=lambda: array("Q"))
    labels: array[int] = field(default_factory=lambda: array("Q"))
    errors: Counter[str] = field(default_factory=Counter)
    count: int = 0
    run: str | None = None

    def note(self, answered: Answered) -> None:
        """A line is answered."""
        place = answered.number - 1
        for kept in (self.digests, self.labels):
            if place >= len(kept):
                kept.extend(bytes(answered.number - len(kept)))
        if not self.digests[place]:
            self.count += 1
        self.run = answered.run or self.run
        self.digests[place] = _short(answered.digest) if answered.digest else _UNCHECKED
        self.labels[place] = _label_of(answered.label)
        if answered.error is not None:
            self.errors[answered.error] += 1

    def has(self, line: Line) -> bool:
        """Whether ``line`` is answered; raise :class:`BadRequest` where it was another line that was answered."""
        place = line.number - 1
        known = self.digests[place] if place < len(self.digests) else 0
        if known <= _UNCHECKED:
            return known == _UNCHECKED
        same = {"id": self.labels[place] == _label_of(line.label), "content": known == _short(line.digest)}
        changed = [what for what, is_same in same.items() if not is_same]
        if changed:
            raise BadRequest(
                f"line {line.number} has another {' and another '.join(changed)} than when it was answered: the input "
                "has changed (or --model or --kind has); write to another file"
            )
        return True


# --- input --------------------------------------------------------------------------------------------------------


class Lines(Protocol):
    """What lines are read from."""

    def readline(self, limit: int, /) -> bytes:
        """The next line, or its next ``limit`` bytes; empty at the end."""


def new_run() -> str:
    """A name for this run; it begins the ids of its requests, so that another run never gets this one's results."""
    return secrets.token_hex(4)


def read_lines(
    stream: Lines, run: str, *, model: str | None = None, kind: Kind | None = None, limit: int = 1 << 22
) -> Iterator[Line]:
    """The lines of ``stream``, one at a time. Blank ones are passed over; those over ``limit`` bytes are bad ones.

    The id of a request follows from ``run`` and the line's own id (``id`` or ``custom_id``) or, where it has none, its
    number and content: the same line of the same run has the same id whenever it is read, and no other run has it.
    """
    for number, raw in enumerate(_raw_lines(stream, limit), start=1):
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if raw.strip():
            yield _line(number, raw, run, model, kind, limit)


def _raw_lines(stream: Lines, limit: int) -> Iterator[bytes]:
    # One byte more than allowed shows that a line is too long; the rest of such a line is read away in pieces.
    while raw := stream.readline(limit + 1):
        rest = raw
        while len(rest) > limit and not rest.endswith(b"\n"):
            rest = stream.readline(limit + 1)
        yield raw


def _line(number: int, raw: bytes, run: str, model: str | None, kind: Kind | None, limit: int) -> Line:
    content: InferenceRequest | BadRequest
    label: Any = None
    custom = False
    basis = raw.strip()
    try:
        if len(raw) > limit:
            raise PayloadTooLarge(f"the line is longer than {limit} bytes (fleet.max_payload_bytes)")
        data = complete(_object(raw), model=model, kind=kind)
        custom = "custom_id" in data
        label, data = _labelled(data)
        # What the defaults filled in counts as content: another --model makes another request of the same line.
        basis = orjson.dumps(data, option=orjson.OPT_SORT_KEYS)
        content = InferenceRequest.parse({**data, "id": label} if label is not None else data)
    except BadRequest as error:
        content = error
    digest = hashlib.blake2b(basis, digest_size=_DIGEST_BYTES, person=b"line", salt=number.to_bytes(16, "big")).digest()
    label = label if isinstance(label, str) else ""
    request_id = f"{run}-{_in_id(label) if label else digest.hex()}"
    if isinstance(content, InferenceRequest):
        request_id = id_in_fleet(request_id, content.tenant)
        content = content.model_copy(update={"id": request_id})
    return Line(number, label or request_id, content, digest, label, custom)


def _labelled(data: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A line's own id, not checked yet (``None`` where it has none), and the rest of its data."""
    given = [data[name] for name in ("id", "custom_id") if data.get(name) is not None]
    if len(given) == 2 and given[0] != given[1]:
        raise BadRequest("id and custom_id differ: give one of them")
    rest = {name: value for name, value in data.items() if name not in ("id", "custom_id")}
    return (given[0] if given else None), rest


def _in_id(label: str) -> str:
    if len(label) <= _LONGEST_LABEL:
        return label
    return hashlib.blake2b(label.encode(errors="replace"), digest_size=_DIGEST_BYTES, person=b"label").hexdigest()


def _object(raw: bytes) -> dict[str, Any]:
    try:
        data = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        # The message says where and what, never the line itself.
        raise BadRequest(f"the line is not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(data, dict):
        raise BadRequest("the line is not a JSON object")
    return data


def _short(digest: bytes) -> int:
    return max(int.from_bytes(digest[:8], "big"), _UNCHECKED + 1)


def _label_of(label: str) -> int:
    """What is kept of a line's own id; 0 where it has none."""
    if not label:
        return 0
    return _short(hashlib.blake2b(label.encode(errors="replace"), digest_size=8, person=b"label").digest())


# --- answers ------------------------------------------------------------------------------------------------------


def answer(line: Line, outcome: Outcome, run: str) -> bytes:
    """The line that goes into the answer file of a run."""
    data: dict[str, Any] = {"line": line.number, "id": line.id}
    if line.custom:
        data["custom_id"] = line.label
    if line.label:
        data |= {"run": run, "digest": line.digest.hex()}
    if isinstance(outcome, FleetError):
        data["error"] = {"type": type(outcome).__name__, "message": outcome.message}
    else:
        data["result"] = vars(outcome)
    return orjson.dumps(data) + b"\n"


@dataclass(frozen=True, slots=True)
class Answered:
    """What an answer file says of one line: its number, its own id and digest, the run, and the error it ended with."""

    number: int
    label: str
    digest: bytes
    run: str | None
    error: str | None


@dataclass(frozen=True, slots=True)
class Scan:
    """What is to be kept of an answer file, line by line: its bytes, and where the file's whole lines end."""

    answers: Answers
    end: int
    unterminated: bool


def scan(lines: Iterable[bytes], *, drop_errors: bool = False, keep: Sink | None = None) -> Scan:
    """Read an answer file that an earlier run may have left torn.

    A last line without its newline is whole if it is JSON; otherwise it does not count (``end`` is where it begins).
    With ``drop_errors`` lines answered with an error do not count either. What counts is copied to ``keep``. Raises
    :class:`BadRequest` for any other line that is not an answer: the file is not one of ours.
    """
    answers = Answers()
    end = 0
    for position, raw in enumerate(lines, start=1):
        whole = raw.endswith(b"\n")
        try:
            answered = _parse_answer(raw)
        except BadRequest as problem:
            if not whole:
                break
            raise BadRequest(f"line {position} {problem.message}") from None
        end += len(raw)
        if answered.error is None or not drop_errors:
            answers.note(answered)
            if keep is not None:
                keep.write(raw if whole else raw + b"\n")
        if not whole:
            return Scan(answers, end, unterminated=True)
    return Scan(answers, end, unterminated=False)


def _parse_answer(raw: bytes) -> Answered:
    try:
        data = orjson.loads(raw)
    except orjson.JSONDecodeError:
        raise BadRequest("is not JSON") from None
    number = data.get("line") if isinstance(data, dict) else None
    if type(number) is not int or number < 1:
        raise BadRequest("has no line number")
    error = None
    if "result" not in data:
        if not isinstance(data.get("error"), dict):
            raise BadRequest("has neither a result nor an error")
        error = str(data["error"].get("type"))
    name, digest = str(data.get("id")), str(data.get("digest"))
    if _DIGEST.fullmatch(digest):
        return Answered(number, name, bytes.fromhex(digest), str(data.get("run")), error)
    own = _OWN_ID.fullmatch(name.rpartition("/")[2])
    if own:
        return Answered(number, "", bytes.fromhex(own[1]), own[0][:8], error)
    return Answered(number, name, b"", None, error)
