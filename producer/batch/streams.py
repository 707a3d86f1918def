"""The files that a batch reads and writes: plain, or compressed where their names end so; regular ones, pipes, devices.

Compressed files are in frames, one behind the other, as ``gzip`` and ``zstd`` write and read them.
"""

from __future__ import annotations

import gzip
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from shared.errors import BadRequest, MissingDependency

STANDARD = "-"
"""Stands for the standard input or output."""

STANDARD_OUTPUT = "the standard output"

GZIP_LEVEL = 6


@dataclass(frozen=True, slots=True)
class Codec:
    """How files of one kind are read and written, and what reading raises where the content is not of that kind.

    ``EOFError`` is raised where a file ends too early.
    """

    read: Callable[[BinaryIO], Any]
    write: Callable[[BinaryIO], Any]
    damaged: tuple[type[Exception], ...]


def codec_of(name: str) -> Codec | None:
    """What a file's name asks for: gzip for ``.gz``, Zstandard for ``.zst``, otherwise nothing.

    Raises :class:`MissingDependency` where there is no Zstandard here.
    """
    if name.endswith(".gz"):
        write = partial(gzip.open, mode="wb", compresslevel=GZIP_LEVEL)
        return Codec(gzip.open, write, (gzip.BadGzipFile, zlib.error))
    if name.endswith(".zst"):
        zstd = _zstd(name)
        return Codec(zstd.open, partial(zstd.open, mode="wb"), (zstd.ZstdError,))
    return None


def _zstd(name: str) -> Any:
    for module in ("compression.zstd", "backports.zstd"):  # the standard library has it from 3.14 on
        try:
            return import_module(module)
        except ImportError:
            continue
    raise MissingDependency(f"{name}: .zst files need the package backports.zstd: pip install backports.zstd")


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Make what the system refuses say which file it is about."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = name
        raise


class Source:
    """The lines of the file called ``name``; ``-`` is the standard input.

    A compressed file that is cut off or damaged ends there, and ``damage`` says so: what comes before can be answered.
    """

    def __init__(self, name: str) -> None:
        self.damage: BadRequest | None = None
        self._name = name
        self._codec = codec_of(name)
        self._damaged_by = self._codec.damaged if self._codec else ()
        self._raw = sys.stdin.buffer if name == STANDARD else Path(name).open("rb")  # noqa: SIM115  # until it is left
        self._lines = self._codec.read(self._raw) if self._codec else self._raw
        self._read = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._name != STANDARD:
            self._lines.close()
            self._raw.close()

    @property
    def size(self) -> int | None:
        """Bytes of the file, ``None`` where nobody knows."""
        return Path(self._name).stat().st_size if Path(self._name).is_file() else None

    @property
    def position(self) -> int:
        """Bytes of the file that have been read, of a pipe 0."""
        return self._raw.tell() if self._raw.seekable() else 0

    def readline(self, limit: int) -> bytes:
        """The next line, or its next ``limit`` bytes; empty at the end."""
        try:
            with naming(self._name):
                line = self._lines.readline(limit)
        except EOFError:
            return self._damaged("cut off")
        except self._damaged_by:
            return self._damaged("damaged, or not what its name says,")
        self._read += line.endswith(b"\n")
        return line

    def _damaged(self, how: str) -> bytes:
        self.damage = BadRequest(f"{self._name}: the file is {how} after line {self._read}")
        return b""


class Sink:
    """Writes lines to a stream, compressed where there is a codec, each of them through to the system."""

    def __init__(self, raw: BinaryIO, codec: Codec | None) -> None:
        self.raw = raw
        self._frame = codec.write(raw) if codec else None

    def write(self, line: bytes) -> None:
        """Take a line; :meth:`flush` writes it through."""
        (self._frame or self.raw).write(line)

    def flush(self) -> None:
        """Write everything through to the system, so that killing this process loses none of it."""
        if self._frame is not None:
            self._frame.flush()
        self.raw.flush()

    def end(self) -> None:
        """Write the end of what is compressed; the stream stays open."""
        if self._frame is not None:
            self._frame.close()
        self.raw.flush()


def whole_lines(raw: BinaryIO, codec: Codec | None) -> Iterator[bytes]:
    """The lines of a file that may be torn. Raises :class:`BadRequest` where it is not what its name says."""
    if codec is None:
        yield from raw
        return
    number = 0
    try:
        for line in codec.read(raw):
            yield line
            number += 1
    except EOFError:
        return
    except codec.damaged as error:
        raise BadRequest(f"line {number + 1} cannot be decompressed ({error})") from None
