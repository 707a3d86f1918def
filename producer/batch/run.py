"""Running a batch file: lines in, answers out, with bounded memory; it can be stopped and taken up again."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from producer.batch.files import Answers, Line, answer, new_run, read_lines, scan
from producer.batch.streams import STANDARD, STANDARD_OUTPUT, Sink, Source, codec_of, naming, whole_lines
from producer.client.client import Client
from producer.client.window import Item
from shared.contract import InferenceRequest, Kind
from shared.errors import BadRequest, BrokerUnavailable, FleetError, NoEngineAvailable

LOOKED_UP = 4096
"""Unanswered lines whose results are looked for when a run is taken up again: those that can have been under way."""


@dataclass(slots=True)
class Summary:
    """What became of a file. ``earlier`` lines were answered by a run before; their errors are in ``errors`` too."""

    answered: int = 0
    earlier: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def failed(self) -> int:
        """Lines whose answer is an error."""
        return self.errors.total()

    def __str__(self) -> str:
        text = f"{self.answered + self.earlier} lines answered"
        if self.errors:
            kinds = ", ".join(f"{name} {count}" for name, count in self.errors.most_common())
            text += f", {self.failed} of them with an error ({kinds})"
        if self.earlier:
            text += f"; {self.earlier} by an earlier run"
        rate = f", {self.answered / self.seconds:.0f} lines/s" if self.answered and self.seconds else ""
        return f"{text}; {self.seconds:.1f} s{rate}"


Report = Callable[[Summary], None]
"""Called after each answer with the sums so far."""


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """How a file is run: what its lines lack, and how many are under way at once (``timeout``: seconds each)."""

    model: str | None = None
    kind: Kind | None = None
    window: int = 512
    timeout: float | None = None
    retry_errors: bool = False


class AnswerFile:
    """The file that answers are appended to. What an earlier run wrote is read first; a torn end is cut off.

    Raises :class:`BadRequest` where the file is something else or where another process writes to it.
    """

    def __init__(self, path: Path, *, drop_errors: bool = False) -> None:
        self.answers = Answers()
        self.taken_up = path.exists()
        self._name = str(path)
        self._codec = codec_of(path.name)
        path = path.resolve()  # what takes its place is not to take that of a link to it, or of /dev/stdout
        self._stream = _locked(path)
        try:
            with naming(self._name):
                # What is compressed cannot be cut off at a line.
                if self.taken_up and (drop_errors or self._codec is not None):
                    self._rewrite(path, drop_errors)
                else:
                    self._repair()
        except BadRequest as error:
            self._stream.close()
            raise BadRequest(
                f"{self._name}: {error.message}; it was not written by muai batch: name another file"
            ) from None

    def append(self, line: bytes) -> None:
        """Write one answer through to the system, so that killing this process loses no written line."""
        with naming(self._name):
            self._sink.write(line)
            self._sink.flush()

    def close(self) -> None:
        """Close the file."""
        with naming(self._name), self._stream:
            self._sink.end()

    def _repair(self) -> None:
        found = scan(self._stream)
        self.answers = found.answers
        self._stream.truncate(found.end)
        self._stream.seek(0, os.SEEK_END)
        self._sink = Sink(self._stream, self._codec)
        if found.unterminated:
            self.append(b"\n")

    def _rewrite(self, path: Path, drop_errors: bool) -> None:
        """Write what is to be kept into a new file, which then takes the place of the old one in one step."""
        draft = path.with_name(path.name + ".draft")
        kept = _locked(draft)
        try:
            kept.truncate(0)
            sink = Sink(kept, self._codec)
            lines = whole_lines(self._stream, self._codec)
            self.answers = scan(lines, drop_errors=drop_errors, keep=sink).answers
            sink.flush()
            os.fsync(kept.fileno())
            draft.replace(path)
        except BaseException:
            kept.close()
            draft.unlink(missing_ok=True)
            raise
        self._stream.close()
        self._stream, self._sink = kept, sink


class StreamOutput:
    """Answers go to a pipe, a device or the standard output: nothing can be read back from it."""

    def __init__(self, name: str) -> None:
        self.answers = Answers()
        self.taken_up = False
        self._standard = name == STANDARD
        self._name = STANDARD_OUTPUT if self._standard else name
        codec = codec_of(name)
        raw = sys.stdout.buffer if self._standard else Path(name).open("wb")  # noqa: SIM115  # until it is closed
        self._sink = Sink(raw, codec)

    def append(self, line: bytes) -> None:
        """Write one answer."""
        with naming(self._name):
            self._sink.write(line)
            self._sink.flush()

    def close(self) -> None:
        """Close it; the standard output is left to its owner."""
        with naming(self._name), nullcontext() if self._standard else self._sink.raw:
            self._sink.end()


def _locked(path: Path) -> BinaryIO:
    stream = path.open("a+b")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stream.close()
        raise BadRequest(f"{path}: another process writes to it") from None
    stream.seek(0)
    return stream


def run_batch(
    client: Client, source: Source, output: AnswerFile | StreamOutput, options: BatchOptions, report: Report
) -> Summary:
    """Answer every line of ``source`` that ``output`` does not hold an answer to, in the order of the lines.

    A line that cannot be answered gets its error and the others go on. Raises :class:`BrokerUnavailable` where the
    broker is lost: what is written stays, and the next run goes on from there. Raises :class:`NoEngineAvailable` where
    there is something to do and not one worker at the start.
    """
    started = time.monotonic()
    summary = Summary(earlier=output.answers.count, errors=Counter(output.answers.errors))
    run = (None if options.retry_errors else output.answers.run) or new_run()
    limit = client.settings.fleet.max_payload_bytes
    lines = read_lines(source, run, model=options.model, kind=options.kind, limit=limit)
    pending = (line for line in lines if not output.answers.has(line))
    open_lines: deque[Line] = deque()
    look_up = LOOKED_UP if output.taken_up and output.answers.run == run else 0
    first = next(pending, None)
    if first is None:
        return summary
    if not client.fleet():
        raise NoEngineAvailable("no worker is alive. Start one with: celery -A workers worker -Q pytorch")
    items = _items(client, chain([first], pending), open_lines, look_up)
    for outcome in client.map(items, window=options.window, errors="yield", timeout=options.timeout):
        if isinstance(outcome, BrokerUnavailable):
            raise outcome
        output.append(answer(open_lines.popleft(), outcome, run))
        summary.answered += 1
        if isinstance(outcome, FleetError):
            summary.errors[type(outcome).__name__] += 1
        summary.seconds = time.monotonic() - started
        report(summary)
    summary.seconds = time.monotonic() - started
    return summary


def _items(client: Client, lines: Iterator[Line], open_lines: deque[Line], look_up: int) -> Iterator[Item]:
    """What to submit for each line; the lines are noted in ``open_lines``, in the same order."""
    for line in lines:
        item: Item = line.content
        if look_up > 0 and isinstance(item, InferenceRequest):
            # A run that was killed may have left answers with the broker that it had no time to write down.
            item = client.recover(item.id) or item
            look_up -= 1
        open_lines.append(line)
        yield item


@contextmanager
def opened(name: str, *, drop_errors: bool) -> Iterator[AnswerFile | StreamOutput]:
    """The output that a command line names; ``-`` is the standard output.

    A regular file, or one that is not there yet, can be taken up by another run; a pipe or a device cannot.
    """
    path = Path(name)
    stream = name == STANDARD or (path.exists() and not path.is_file() and not path.is_dir())
    output: AnswerFile | StreamOutput
    if stream:
        output = StreamOutput(
            STANDARD if name == "/dev/stdout" else name
        )  # which may be a socket: they cannot be opened
    else:
        output = AnswerFile(path, drop_errors=drop_errors)
    try:
        yield output
    finally:
        output.close()
