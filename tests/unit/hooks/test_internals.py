"""What is relied upon of Celery, kombu and redis-py is as it was when it was read, and all of it is in the table."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import tomllib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import FunctionType, ModuleType

import pytest
import redis
from packaging.requirements import Requirement

import demo
import producer
import shared
import workers
from shared import broker
from workers.hooks import internals
from workers.hooks.internals import LIBRARIES, NAMES, RELIED_UPON, Recorded

ROOT = Path(__file__).resolve().parents[3]
RECORDED = Recorded.read(internals.KEPT)
OF_PYTHON = {"_current_frames", "_exit", "_run_exitfuncs"}
"""Names of Python's own library, the first of which is public."""


def our_modules() -> Iterator[ModuleType]:
    """Every module but the engines', which rely upon libraries of their own."""
    for package in (shared, producer, workers, demo):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not found.name.startswith("workers.engines.") and not found.name.endswith("__main__"):
                yield importlib.import_module(found.name)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_what_it_was(name):
    """One clear line for each thing that has changed."""
    line = internals.changed(name, RECORDED)

    if line is not None:
        pytest.fail(line, pytrace=False)


def test_nothing_is_kept_that_is_not_relied_upon():
    """The record and the table name the same, and the files of the table are there."""
    assert sorted(RECORDED.fingerprints) == NAMES
    assert sorted(RECORDED.versions) == LIBRARIES
    assert [file for file in RELIED_UPON if not (ROOT / file).is_file()] == []


def test_every_override_is_in_the_table():
    """Whoever overrides a method of these libraries says so there."""
    known = {id(internals.named(name)) for name in NAMES}
    classes = {broker._telling(redis.Connection).__mro__[1]: redis.Connection}
    for module in our_modules():
        for cls in vars(module).values():
            if inspect.isclass(cls) and cls.__module__ == module.__name__:
                bases = [base for base in cls.__mro__ if base.__module__.partition(".")[0] in LIBRARIES]
                classes |= {cls: bases[0]} if bases else {}

    overridden = {
        f"{cls.__module__}.{cls.__name__}.{name}": inspect.getattr_static(base, name)
        for cls, base in classes.items()
        for name, ours in vars(cls).items()
        if isinstance(ours, FunctionType | property | cached_property) and not name.startswith("__")
        if hasattr(base, name)
    }
    assert len(overridden) > 30
    assert sorted(name for name, theirs in overridden.items() if id(theirs) not in known) == []


def test_every_private_name_is_in_the_table():
    """A private name that is used here is ours, or occurs in something of the table."""
    ours, used = set(), {}
    for module in our_modules():
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                ours.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                ours.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                ours.add(node.id)
            elif isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr):
                used.setdefault(node.attr, module.__name__)
    text = "\n".join(internals.source(internals.named(name)) for name in NAMES)

    theirs = {name: module for name, module in used.items() if name not in ours | OF_PYTHON}
    assert "_delivered" in theirs
    assert {name: module for name, module in theirs.items() if not re.search(rf"\b{name}\b", text)} == {}


def test_a_change_is_told(monkeypatch):
    """A source that is another than the recorded one, a name that is gone, and a version that was not checked."""
    name = "kombu.transport.redis.Channel._brpop_read"
    versions, fingerprints = {**RECORDED.versions, "kombu": "5.6.2"}, {**RECORDED.fingerprints, name: "0"}
    other = Recorded(versions, fingerprints)

    line = internals.changed(name, other)
    warning = internals.unchecked(other)
    monkeypatch.delattr("kombu.transport.redis.Channel._brpop_read")
    gone = internals.changed(name, other)

    assert line is not None
    assert re.fullmatch(
        rf"{re.escape(name)} of kombu \S+ is not what workers/hooks/transport.py was checked against \(5.6.2\): "
        "read it again, then record it: python -m workers.hooks.internals --record",
        line,
    )
    assert warning is not None
    assert warning.startswith("this worker was not checked with kombu ")
    assert warning.endswith(f"relies upon, {name} differs")
    assert gone is not None
    assert "is not there, and workers/hooks/transport.py needs it" in gone


def test_the_versions_here_were_checked():
    """A worker with the recorded versions has nothing to warn of."""
    assert internals.unchecked(RECORDED) is None


def test_the_project_admits_no_version_beyond_the_next_minor_one():
    """The bounds of the dependencies admit what was checked, and not its next minor version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounds = {found.name: found.specifier for found in map(Requirement, project["dependencies"])}

    for library, checked in RECORDED.versions.items():
        major, minor = checked.split(".")[:2]
        assert bounds[library].contains(checked), library
        assert not bounds[library].contains(f"{major}.{int(minor) + 1}.0"), library


def test_what_is_there_can_be_recorded(tmp_path):
    """What is recorded is what is found again."""
    path = tmp_path / "internals.json"

    Recorded.now().write(path)

    assert Recorded.read(path) == Recorded.now()


def test_the_command_says_what_has_changed(monkeypatch, tmp_path, capsys):
    """Nothing, as things are; a line for what is not recorded as it is; and nothing again once it was recorded."""
    kept = tmp_path / "internals.json"
    Recorded({**RECORDED.versions, "vine": "5.0.0"}, {**RECORDED.fingerprints, NAMES[-1]: "0"}).write(kept)
    monkeypatch.setattr(internals, "KEPT", kept)

    statuses = [internals.main([]), internals.main(["--record"]), internals.main([]), internals.main(["--all"])]

    assert statuses == [1, 0, 0, 2]
    changed, nothing = capsys.readouterr().out.splitlines()
    assert changed.startswith(f"{NAMES[-1]} of vine ")
    assert nothing.startswith("nothing has changed: celery ")
