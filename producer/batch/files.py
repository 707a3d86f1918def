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
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

import orjson

from producer.client.records import Outcome
from producer.client.shorthand import complete
from shared.contract import InferenceRequest, Kind
from shared.errors import BadRequest, FleetError, PayloadTooLarge

_OWN_ID = re.compile(r"[0-9a-f]{8}-([0-9a-f]{32})")
_DIGEST_BYTES = 16
_LONGEST_ID = 128
_UNCHECKED = 1
"""Stands for a line whose id is the user's own: there is no digest to compare."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the input: its number (from 1), the request's id, and the request or what is wrong with it.

    ``digest`` stands for the content, so that a later run notices when the line has changed.
    """

    number: int
    id: str
    content: InferenceRequest | BadRequest
    digest: int


@dataclass(slots=True)
class Answers:
    """What an answer file holds: which lines are answered, and how many of them with an error, by type."""

    digests: array[int] = field(default_factory=lambda: array("Q"))
    errors: Counter[str] = field(default_factory=Counter)
    count: int = 0
    run: str | None = None

    def note(self, number: int, request_id: str, error: str | None) -> None:
        """Line ``number`` is answered."""
        if number > len(self.digests):
            self.digests.extend(bytes(number - len(self.digests)))
        if not self.digests[number - 1]:
            self.count += 1
        own = _OWN_ID.fullmatch(request_id)
        if own:
            self.run = request_id[:8]
        self.digests[number - 1] = _short(bytes.fromhex(own[1])) if own else _UNCHECKED
        if error is not None:
            self.errors[error] += 1

    def has(self, line: Line) -> bool:
        """Whether ``line`` is answered; raise :class:`BadRequest` where the answer is that of another content."""
        known = self.digests[line.number - 1] if line.number <= len(self.digests) else 0
        if known > _UNCHECKED and known != line.digest:
            raise BadRequest(
                f"line {line.number} is not the line that was answered before: the input has changed (or --model or "
                "--kind has); write to another file"
            )
        return known != 0


# --- input --------------------------------------------------------------------------------------------------------


def new_run() -> str:
    """A name for this run; it begins the ids of its requests, so that another run never gets this one's results."""
    return secrets.token_hex(4)


def read_lines(
    stream: BinaryIO,
    run: str,
    *,
    model: str | None = None,
    kind: Kind | None = None,
    limit: int = 1 << 22,
    rename: bool = False,
) -> Iterator[Line]:
    """The lines of ``stream``, one at a time. Blank ones are passed over; those over ``limit`` bytes are bad ones.

    The id of a request is its own, or follows from ``run``, the line's number and its content: the same line of the
    same run has the same id whenever it is read. With ``rename`` own ids are made new ones too: a request that failed
    keeps its failure, so it can only be tried again under another id.
    """
    for number, raw in enumerate(_raw_lines(stream, limit), start=1):
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if raw.strip():
            line = _line(number, raw, run, model, kind, limit)
            yield _renamed(line, run) if rename and not _OWN_ID.fullmatch(line.id) else line


def _raw_lines(stream: BinaryIO, limit: int) -> Iterator[bytes]:
    # One byte more than allowed shows that a line is too long; the rest of such a line is read away in pieces.
    while raw := stream.readline(limit + 1):
        rest = raw
        while len(rest) > limit and not rest.endswith(b"\n"):
            rest = stream.readline(limit + 1)
        yield raw


def _line(number: int, raw: bytes, run: str, model: str | None, kind: Kind | None, limit: int) -> Line:
    content: InferenceRequest | BadRequest
    named: str | None = None
    basis = raw.strip()
    try:
        if len(raw) > limit:
            raise PayloadTooLarge(f"the line is longer than {limit} bytes (fleet.max_payload_bytes)")
        data = complete(_object(raw), model=model, kind=kind)
        # What the defaults filled in counts as content: another --model makes another request of the same line.
        basis = orjson.dumps(data, option=orjson.OPT_SORT_KEYS)
        named = data.get("id") if isinstance(data.get("id"), str) and data["id"] else None
        content = InferenceRequest.parse(data)
    except BadRequest as error:
        content = error
    digest = hashlib.blake2b(basis, digest_size=_DIGEST_BYTES, person=b"line", salt=number.to_bytes(16, "big")).digest()
    request_id = named or f"{run}-{digest.hex()}"
    if isinstance(content, InferenceRequest) and named is None:
        content = content.model_copy(update={"id": request_id})
    return Line(number, request_id, content, _short(digest))


def _renamed(line: Line, run: str) -> Line:
    request_id = f"{line.id[: _LONGEST_ID - len(run) - 1]}-{run}"
    content = line.content
    if isinstance(content, InferenceRequest):
        content = content.model_copy(update={"id": request_id})
    return replace(line, id=request_id, content=content)


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


# --- answers ------------------------------------------------------------------------------------------------------


def answer(line: Line, outcome: Outcome) -> bytes:
    """The line that goes into the answer file."""
    data: dict[str, Any] = {"line": line.number, "id": line.id}
    if isinstance(outcome, FleetError):
        data["error"] = {"type": type(outcome).__name__, "message": outcome.message}
    else:
        data["result"] = vars(outcome)
    return orjson.dumps(data) + b"\n"


@dataclass(frozen=True, slots=True)
class Scan:
    """What is to be kept of an answer file, line by line: its bytes, and where the file's whole lines end."""

    answers: Answers
    end: int
    unterminated: bool


def scan(lines: Iterable[bytes], *, drop_errors: bool = False, keep: BinaryIO | None = None) -> Scan:
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
            number, request_id, error = _parse_answer(raw)
        except BadRequest as problem:
            if not whole:
                break
            raise BadRequest(f"line {position} {problem.message}") from None
        end += len(raw)
        if error is None or not drop_errors:
            answers.note(number, request_id, error)
            if keep is not None:
                keep.write(raw if whole else raw + b"\n")
        if not whole:
            return Scan(answers, end, unterminated=True)
    return Scan(answers, end, unterminated=False)


def _parse_answer(raw: bytes) -> tuple[int, str, str | None]:
    try:
        data = orjson.loads(raw)
    except orjson.JSONDecodeError:
        raise BadRequest("is not JSON") from None
    number = data.get("line") if isinstance(data, dict) else None
    if type(number) is not int or number < 1:
        raise BadRequest("has no line number")
    if "result" in data:
        return number, str(data.get("id")), None
    error = data.get("error")
    if not isinstance(error, dict):
        raise BadRequest("has neither a result nor an error")
    return number, str(data.get("id")), str(error.get("type"))
