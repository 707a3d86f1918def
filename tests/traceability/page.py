"""The page ``docs/properties.md``: for each property and requirement the tests that show it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.traceability.catalogue import OTHER_FILES, PROPERTIES, PROPERTY_FILES, REQUIREMENTS, ROOMS, Property
from tests.traceability.tags import LEAST_EXAMPLES, Tag

_HEAD = f"""\
# Properties and requirements

Which test shows what. Written by `python -m tests.traceability` (`make properties`) from the tags above the tests and
from `tests/traceability/catalogue.py`; what is not shown yet names what it will come with.

A test over random inputs that shows a property has the line
`# Feature: advanced-optimization-monitoring, Property N: <its words here>` directly above it and runs at least
{LEAST_EXAMPLES} examples. Any test may name the requirements it shows: `# Requirements: 1.1, 1.4`. A requirement is
also shown by the tests of its properties. Paths are those below `tests/`.
"""


def problems(tags: Sequence[Tag], tests: Path) -> list[str]:
    """What is wrong with the tags and the catalogue, a line each. ``tests`` is the folder of the tests."""
    found = []
    words = {str(known.number): known.words for known in PROPERTIES}
    numbers = {known.number for known in REQUIREMENTS}
    for tag in tags:
        known_numbers = words.keys() if tag.of_property else numbers
        noun = "property" if tag.of_property else "requirement"
        found += [f"{tag.place}: there is no {noun} {n}" for n in tag.numbers if n not in known_numbers]
        if tag.of_property and tag.words != words.get(tag.numbers[0], tag.words):
            found.append(f"{tag.place}: property {tag.numbers[0]} is: {words[tag.numbers[0]]}")
    tagged = {tag.numbers[0] for tag in tags if tag.of_property}
    for known in PROPERTIES:
        if known.room and str(known.number) in tagged:
            found.append(f"property {known.number} has a test: take its room out of the catalogue")
        if not known.room and str(known.number) not in tagged:
            found.append(f"property {known.number} ({known.words}) has no test")
    direct = {number for tag in tags if not tag.of_property for number in tag.numbers}
    for requirement in REQUIREMENTS:
        shown = requirement.number in direct or any(str(p.number) in tagged for p in _behind(requirement.number))
        if not shown and not requirement.room:
            found.append(f"requirement {requirement.number} ({requirement.words}) has no test")
    for name, places in OTHER_FILES.items():
        found += [f"{name}: there is no {p} here" for p in places if p not in ROOMS and not (tests / p).exists()]
    return found


def page(tags: Sequence[Tag]) -> str:
    """The whole page."""
    properties = [
        _row(str(known.number), known.words, ", ".join(known.validates), _shown(_of_property(tags, known), known.room))
        for known in PROPERTIES
    ]
    requirements = []
    for known in REQUIREMENTS:
        own = [tag for tag in tags if not tag.of_property and known.number in tag.numbers]
        behind = [p for p in _behind(known.number) if _of_property(tags, p)]
        through = ", ".join(f"property {p.number}" for p in behind)
        tests = "<br>".join(filter(None, [through, _files(own)]))
        coming = f"the rest comes with: {ROOMS[known.room]}" if tests and known.room else ""
        cell = "<br>".join(filter(None, [tests, coming])) or _shown([], known.room)
        requirements.append(_row(known.number, known.words, cell))
    return "\n".join(
        [
            _HEAD,
            "## Properties\n",
            *_table(("N", "For all inputs", "Requirements", "Shown by"), properties),
            "\n## Requirements\n",
            *_table(("N", "What", "Shown by"), requirements),
            "\n## The specification's files\n",
            "Tests stand in rooms, by the part of the fleet that they are of.\n",
            *_table(("There", "Here"), _mapping(tags)),
            "",
        ]
    )


def _mapping(tags: Sequence[Tag]) -> list[str]:
    rows = []
    for name, numbers in PROPERTY_FILES.items():
        members = [known for known in PROPERTIES if known.number in numbers]
        here = {tag.file for known in members for tag in _of_property(tags, known)}
        rooms = {known.room for known in members if known.room}
        rows.append(_row(f"`property/{name}`", _places(map(str, sorted(here)), sorted(rooms))))
    for name, places in OTHER_FILES.items():
        here = [place for place in places if place not in ROOMS]
        rows.append(_row(f"`{name}`", _places(here, [place for place in places if place in ROOMS])))
    return rows


def _places(files: Iterable[str], rooms: Iterable[str]) -> str:
    return "<br>".join([*(_link(file) for file in files), *(f"to come with: {ROOMS[room]}" for room in rooms)])


def _behind(number: str) -> list[Property]:
    return [known for known in PROPERTIES if number in known.validates]


def _of_property(tags: Sequence[Tag], known: Property) -> list[Tag]:
    return [tag for tag in tags if tag.of_property and tag.numbers[0] == str(known.number)]


def _shown(tags: Sequence[Tag], room: str) -> str:
    return _files(tags) or (f"none yet; comes with: {ROOMS[room]}" if room else "nothing")


def _files(tags: Sequence[Tag]) -> str:
    """The tests, by file."""
    by_file: dict[Path, list[str]] = {}
    for tag in tags:
        by_file.setdefault(tag.file, []).append(f"`{tag.test}`")
    return "<br>".join(f"{_link(str(file))}: {', '.join(names)}" for file, names in by_file.items())


def _link(file: str) -> str:
    return f"[{file}](../tests/{file})"


def _table(head: Sequence[str], rows: Iterable[str]) -> list[str]:
    return [_row(*head), "|" + "---|" * len(head), *rows]


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
