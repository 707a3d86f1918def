"""The tags in the tests: comment lines directly above a test that say which property or requirements it shows.

``# Feature: advanced-optimization-monitoring, Property 27: a full queue refuses`` is for tests over random inputs
(Hypothesis), with at least :data:`LEAST_EXAMPLES` of them; ``# Requirements: 1.1, 1.4`` for any test.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from hypothesis import is_hypothesis_test, settings

FEATURE = "advanced-optimization-monitoring"
LEAST_EXAMPLES = 100

_TAG = re.compile(r"#\s*(Feature|Requirements):\s*(.*?)\s*$")
_PROPERTY = re.compile(rf"{FEATURE}, Property (\d+): (.+)")
_NUMBERS = re.compile(r"\d+\.\d+(, \d+\.\d+)*")


class TagError(Exception):
    """A tag says what is not so."""


@dataclass(frozen=True, slots=True)
class Tag:
    """What one tag says of a test. ``words`` are the property's; of requirements there are only ``numbers``."""

    file: Path
    line: int
    test: str
    numbers: tuple[str, ...]
    words: str = ""

    @property
    def place(self) -> str:
        """Where the tag stands."""
        return f"{self.file}:{self.line}"

    @property
    def of_property(self) -> bool:
        """Whether it names a property, not requirements."""
        return bool(self.words)


def tags_in(root: Path) -> list[Tag]:
    """Every tag of the test files below ``root``, by file and line. Paths are relative to ``root``."""
    return [tag for file in sorted(root.rglob("test_*.py")) for tag in tags_of(file, root)]


def tags_of(file: Path, root: Path) -> list[Tag]:
    """The tags of one file; raise :class:`TagError` for one that cannot be read or stands above no test."""
    text = file.read_text(encoding="utf-8")
    comments = _comments(text)
    left = {line for line, comment in comments.items() if _TAG.match(comment)}
    found = []
    for test, first in _tests(ast.parse(text)) if left else ():
        line = first - 1
        while line in comments:
            if line in left:
                left.remove(line)
                found.append(_read(comments[line], file.relative_to(root), line, test))
            line -= 1
    if left:
        raise TagError(f"{file.relative_to(root)}:{min(left)}: this tag stands directly above no test")
    return sorted(found, key=lambda tag: tag.line)


def _comments(text: str) -> dict[int, str]:
    """The comments of a module by line."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}


def _tests(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """The tests of a module by name, each with its first line (that of its first decorator)."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name.lower().startswith("test"):
            yield node.name, min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id  # TestMachine = Machine.TestCase
            if name.startswith("Test"):
                yield name, node.lineno


def _read(line: str, file: Path, number: int, test: str) -> Tag:
    tag = _TAG.match(line)
    kind, rest = tag.groups() if tag else ("", "")
    if kind == "Feature" and (read := _PROPERTY.fullmatch(rest)):
        return Tag(file, number, test, (read[1],), read[2])
    if kind == "Requirements" and _NUMBERS.fullmatch(rest):
        return Tag(file, number, test, tuple(rest.split(", ")))
    raise TagError(
        f"{file}:{number}: a tag reads `# Feature: {FEATURE}, Property N: words` or `# Requirements: 1.1, 1.2`"
    )


def examples_of(tag: Tag, package: str) -> int:
    """How many examples the tagged test runs; 0 where it is no Hypothesis test. ``package`` is that of the tests."""
    module = import_module(".".join([package, *tag.file.with_suffix("").parts]))
    test = getattr(module, tag.test)
    if isinstance(test, type):  # a state machine
        configured = getattr(test, "settings", None)
    else:
        configured = getattr(test, "_hypothesis_internal_use_settings", settings.default)
        if not is_hypothesis_test(test):
            configured = None
    return configured.max_examples if isinstance(configured, settings) else 0
