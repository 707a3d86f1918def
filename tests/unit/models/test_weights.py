"""Which weights are which, which are newer, and what is said of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shared.registry import Weights, WorkerInfo
from shared.weights import differences, newer
from workers.models.weights import SAMPLE_BYTES, SAMPLES, weights_of

OLD, NEW = Weights(digest="aaaa", changed=1000.0), Weights(digest="bbbb", changed=2000.0)


def worker(pid: int, **models: Weights) -> WorkerInfo:
    """A worker that has loaded these weights under these names."""
    return WorkerInfo(id=f"w{pid}", host="h", pid=pid, started=0.0, queues=(), weights={"pytorch": models})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model's folder: one small file, and one that is not read as a whole."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(os.urandom(3 * SAMPLES * SAMPLE_BYTES))
    return folder


def test_the_same_files_are_the_same_weights_wherever_they_are(model: Path, tmp_path: Path) -> None:
    """Whenever they were copied; texts for people and hidden files do not count."""
    before = weights_of(str(model))
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "README.md").write_text("words")
    (copy / ".cache").mkdir()
    (copy / ".cache" / "lock").write_text("x")

    assert weights_of(str(copy)).digest == before.digest


@pytest.mark.parametrize("place", [0, -1, SAMPLE_BYTES * SAMPLES])
def test_other_files_are_other_weights(model: Path, place: int) -> None:
    """A block of tensors that is trained further is seen wherever it is, and so is another configuration."""
    weights = model / "model.safetensors"
    first = weights_of(str(model))
    content = bytearray(weights.read_bytes())
    changed = range(len(content))[place : place + 4 * SAMPLE_BYTES if place >= 0 else None]
    for byte in changed:
        content[byte] ^= 255
    weights.write_bytes(content)
    os.utime(weights, (0, first.changed + 10))
    second = weights_of(str(model))
    (model / "config.json").write_text('{"layers": 3}')

    assert len({first.digest, second.digest, weights_of(str(model)).digest}) == 3
    assert second.changed == pytest.approx(first.changed + 10)


def test_what_is_no_folder_has_no_digest(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    assert weights_of("org/model-on-a-hub") is weights_of(str(tmp_path / "empty")) is None


def test_a_difference_is_told_with_what_is_where() -> None:
    """The newest first; models that are the same everywhere are not mentioned."""
    fleet = [worker(1, m=OLD, same=NEW), worker(2, m=NEW, same=NEW), worker(3, m=OLD), worker(4)]

    assert differences(fleet) == {
        "m": "bbbb (files of 1970-01-01 00:33:20 UTC) by h:2; aaaa (files of 1970-01-01 00:16:40 UTC) by h:1, h:3"
    }
    assert differences(fleet[:1]) == {}


def test_the_newest_are_told_by_the_change_of_their_files() -> None:
    """The latest change of equal ones counts, and what was changed at the same time is as new."""
    assert newer({"m": OLD}, [worker(1, m=OLD), worker(2, m=NEW)]) == {"m": NEW}
    assert newer({"m": NEW}, [worker(1, m=OLD), worker(2, m=NEW)]) == {}
    copied = OLD.model_copy(update={"changed": 3000.0})
    assert newer({"m": OLD}, [worker(1, m=OLD), worker(2, m=NEW), worker(3, m=copied)]) == {}
    twin = Weights(digest="cccc", changed=OLD.changed)
    assert newer({"m": OLD}, [worker(1, m=OLD), worker(2, m=twin)]) == {}
    assert newer({}, [worker(2, m=NEW)]) == {}
