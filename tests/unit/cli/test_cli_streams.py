"""The files of a batch: compressed by their names, pipes and devices; a damaged or full one is named."""

import gzip
import os
import resource
import sys
import threading
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from producer.batch.run import AnswerFile, StreamOutput, opened
from producer.batch.streams import Source, codec_of
from shared.errors import BadRequest, MissingDependency

ZSTD_IS_HERE = sys.version_info >= (3, 14) or (find_spec("backports") and find_spec("backports.zstd")) is not None
needs_zstd = pytest.mark.skipif(not ZSTD_IS_HERE, reason="backports.zstd is not installed")
SUFFIXES = ["", ".gz", pytest.param(".zst", marks=needs_zstd)]

ONE, TWO, THREE = (f'{{"line": {number}, "id": "x{number}", "result": {{}}}}\n'.encode() for number in (1, 2, 3))


def written(path: Path, content: bytes) -> Path:
    """A file, compressed as its name says."""
    codec = codec_of(path.name)
    with path.open("wb") as raw:
        if codec is None:
            raw.write(content)
        else:
            with codec.write(raw) as frame:
                frame.write(content)
    return path


def content_of(path: Path) -> bytes:
    """What is in a file, as its name says."""
    codec = codec_of(path.name)
    with path.open("rb") as raw:
        return (codec.read(raw) if codec else raw).read()


def lines_of(source: Source) -> list[bytes]:
    """All lines."""
    return list(iter(lambda: source.readline(1 << 20), b""))


# --- reading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_source_is_read_as_its_name_says(tmp_path, suffix):
    """Lines come out the same, from one frame or several; how far it is counts the bytes on the disk."""
    path = written(tmp_path / f"in.jsonl{suffix}", b"a\nb\n")
    path.write_bytes(path.read_bytes() + written(tmp_path / f"more.jsonl{suffix}", b"c\n").read_bytes())

    with Source(str(path)) as source:
        assert lines_of(source) == [b"a\n", b"b\n", b"c\n"]
        assert source.position == source.size == path.stat().st_size
        assert source.damage is None


@pytest.mark.parametrize("suffix", SUFFIXES[1:])
def test_a_source_that_is_cut_off_is_answered_up_to_there(tmp_path, suffix):
    """What comes before can be answered; what is wrong is said with the file and the line."""
    path = written(
        tmp_path / f"in.jsonl{suffix}", b"".join(b"%d %s\n" % (n, os.urandom(40).hex().encode()) for n in range(10_000))
    )
    path.write_bytes(path.read_bytes()[:-200])

    with Source(str(path)) as source:
        lines = lines_of(source)

    assert 0 < len(lines) < 10_000
    assert all(line.endswith(b"\n") for line in lines)
    assert source.damage.message == f"{path}: the file is cut off after line {len(lines)}"


@pytest.mark.parametrize("suffix", SUFFIXES[1:])
def test_a_source_that_is_not_what_its_name_says(tmp_path, suffix):
    """A plain file under a compressed one's name is told, not a traceback."""
    path = tmp_path / f"in.jsonl{suffix}"
    path.write_bytes(b'{"prompt": "x"}\n')

    with Source(str(path)) as source:
        assert lines_of(source) == []
    assert source.damage.message == f"{path}: the file is damaged, or not what its name says, after line 0"


@pytest.mark.skipif(ZSTD_IS_HERE, reason="there is Zstandard here")
def test_without_zstandard_the_error_names_what_to_install():
    """One line, with the command."""
    with pytest.raises(MissingDependency, match=r"^in\.zst: .*: pip install backports\.zstd$"):
        codec_of("in.zst")


# --- writing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_each_answer_is_there_when_it_was_written(tmp_path, suffix):
    """Killed right after it, the run leaves it readable; the next run goes on behind it."""
    path = tmp_path / f"out.jsonl{suffix}"
    killed = AnswerFile(path)
    killed.append(ONE)
    killed.append(TWO)
    torn = tmp_path / f"torn.jsonl{suffix}"
    torn.write_bytes(path.read_bytes())
    killed.close()

    again = AnswerFile(torn)
    again.append(THREE)
    again.close()

    assert again.taken_up
    assert again.answers.count == 2
    assert content_of(torn) == ONE + TWO + THREE
    assert content_of(path) == ONE + TWO
    assert not list(tmp_path.glob("*.draft"))


@pytest.mark.parametrize("suffix", SUFFIXES[1:])
def test_a_compressed_file_of_another_kind_is_left_alone(tmp_path, suffix):
    """Neither one that is not compressed nor one with other content is touched."""
    for name, content in (
        (f"a{suffix}", b"precious"),
        (f"b{suffix}", written(tmp_path / f"c{suffix}", b"x\n").read_bytes()),
    ):
        path = tmp_path / name
        path.write_bytes(content)

        with pytest.raises(BadRequest, match="it was not written by muai batch"):
            AnswerFile(path)

        assert path.read_bytes() == content
    assert not list(tmp_path.glob("*.draft"))


def test_errors_leave_a_compressed_file_too(tmp_path):
    """With errors to be tried again only the answers are kept."""
    path = written(tmp_path / "out.gz", b'{"line": 1, "id": "a", "error": {"type": "X"}}\n' + TWO)

    AnswerFile(path, drop_errors=True).close()

    assert content_of(path) == TWO


def test_a_link_stays_a_link(tmp_path):
    """What takes the file's place takes it where the file is."""
    written(tmp_path / "real.jsonl", b'{"line": 1, "id": "a", "error": {"type": "X"}}\n' + TWO)
    link = tmp_path / "link.jsonl"
    link.symlink_to("real.jsonl")

    AnswerFile(link, drop_errors=True).close()

    assert link.is_symlink()
    assert (tmp_path / "real.jsonl").read_bytes() == TWO


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_answers_go_into_a_fifo(tmp_path, suffix):
    """A pipe is written to, and nothing is read back from it."""
    path = tmp_path / f"pipe{suffix}"
    os.mkfifo(path)
    got = []
    reader = threading.Thread(target=lambda: got.append(path.read_bytes()))
    reader.start()

    with opened(str(path), drop_errors=False) as output:
        output.append(ONE)
    reader.join(10)

    assert isinstance(output, StreamOutput)
    assert (gzip.decompress(got[0]) if suffix else got[0]) == ONE


@contextmanager
def full_disk(limit: int):
    """A file of this process can have so many bytes: the system refuses more, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_full_disk_is_said_with_the_file(tmp_path, suffix):
    """The error has the name; what was written before is taken up when there is room."""
    path = tmp_path / f"out.jsonl{suffix}"
    output = AnswerFile(path)
    output.append(ONE)
    large = b'{"line": 2, "id": "x2", "result": {"text": "%s"}}\n' % os.urandom(2000).hex().encode()

    with full_disk(path.stat().st_size + 50):
        with pytest.raises(OSError, match="out.jsonl") as error:
            output.append(large)
        with pytest.raises(OSError, match="out.jsonl"):
            output.close()
    again = AnswerFile(path)
    again.append(TWO)
    again.close()

    assert error.value.filename == str(path)
    assert content_of(path) == ONE + TWO


def test_a_full_device_is_named():
    """A device that takes nothing is what the error is about."""
    with (
        pytest.raises(OSError, match="No space left on device: '/dev/full'"),
        opened("/dev/full", drop_errors=False) as out,
    ):
        out.append(ONE)
