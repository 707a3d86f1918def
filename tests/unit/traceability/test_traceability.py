"""The page of properties and requirements, and what is refused in the tags it is made from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.traceability import __main__ as command
from tests.traceability.catalogue import PROPERTIES, REQUIREMENTS, ROOMS
from tests.traceability.page import page, problems
from tests.traceability.tags import FEATURE, Tag, TagError, examples_of, tags_in, tags_of

FILE = Path("property/shared/test_x.py")
FULL = Tag(FILE, 1, "test_x", ("27",), "a full queue refuses")


def test_the_page_is_current(capsys) -> None:
    """``docs/properties.md`` is what the tags say; every tag is right, and what is due has a test of 100 examples."""
    assert command.main(["--check"]) == 0, capsys.readouterr().err


def test_what_the_page_lists_hangs_together() -> None:
    """Numbers are complete, properties bear out requirements that exist, and what is open names a room."""
    numbers = [known.number for known in REQUIREMENTS]

    assert [known.number for known in PROPERTIES] == list(range(1, 61))
    assert len(numbers) == len(set(numbers)) == 87
    assert {number for known in PROPERTIES for number in known.validates} <= set(numbers)
    assert {known.room for known in [*PROPERTIES, *REQUIREMENTS]} <= {"", *ROOMS}


def test_tags_are_read_from_the_lines_above_a_test(tmp_path: Path) -> None:
    """Above decorators, several of them, of functions and of state machines; strings are no comments."""
    (tmp_path / "test_a.py").write_text(
        f"# Feature: {FEATURE}, Property 27: a full queue refuses\n"
        "# Requirements: 8.2, 8.3\n"
        "@decorated\n"
        "def test_one() -> None:\n"
        "    '# Requirements: 1.1'\n"
        "\n"
        "# Requirements: 1.4\n"
        "TestMachine = Machine.TestCase\n"
    )

    read = [(tag.test, tag.numbers, tag.of_property) for tag in tags_in(tmp_path)]

    assert read == [
        ("test_one", ("27",), True),
        ("test_one", ("8.2", "8.3"), False),
        ("TestMachine", ("1.4",), False),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "# Requirements: 1.1\n\ndef test_one(): ...\n",
        "# Requirements: 1.1\ndef helper(): ...\n",
        "# Requirements: one\ndef test_one(): ...\n",
        "# Feature: something-else, Property 1: x\ndef test_one(): ...\n",
        f"# Feature: {FEATURE}, Property one: x\ndef test_one(): ...\n",
    ],
)
def test_a_tag_that_says_nothing_is_refused(tmp_path: Path, text: str) -> None:
    """One that stands above no test, or cannot be read, is named by file and line."""
    (tmp_path / "test_a.py").write_text(text)

    with pytest.raises(TagError, match=r"^test_a\.py:1: "):
        tags_of(tmp_path / "test_a.py", tmp_path)


@pytest.mark.parametrize(
    ("tag", "says"),
    [
        (replace(FULL, numbers=("61",)), "there is no property 61"),
        (replace(FULL, words="a queue that is full refuses"), "property 27 is: a full queue refuses"),
        (Tag(FILE, 1, "test_x", ("1.7",)), "there is no requirement 1.7"),
        (replace(FULL, numbers=("60",), words=PROPERTIES[59].words), "property 60 has a test: take its room out"),
    ],
)
def test_a_wrong_tag_is_named(tag: Tag, says: str) -> None:
    """By number, by words, and where the catalogue does not expect it yet."""
    assert any(says in line for line in problems([tag], command.TESTS))


def test_what_is_due_and_has_no_test_is_named() -> None:
    """Without any tags that is every property and requirement that has no room; with one, all but that."""
    none, one = problems([], command.TESTS), problems([FULL], command.TESTS)

    assert [line for line in none if line.startswith("property 27 (")]
    assert [line for line in none if line.startswith("requirement 8.3 (")]
    assert {*none} - {*one} == {line for line in none if line.startswith(("property 27 (", "requirement 8.3 ("))}


def test_the_page_names_tests_and_rooms() -> None:
    """A property has its tests with a link; one that has none says what it comes with."""
    rows = page([FULL]).splitlines()

    assert f"| 27 | a full queue refuses | 8.3 | [{FILE}](../tests/{FILE}): `test_x` |" in rows
    assert "| 60 | health says what is degraded | 15.6 | none yet; comes with: health and readiness endpoints |" in rows
    assert "| 8.3 | a full queue refuses with an error of its own | property 27 |" in rows


def test_examples_are_counted() -> None:
    """Of Hypothesis' tests, with their own settings, and of state machines; any other test has none."""
    batching = Path("property/path/test_batching_properties.py")
    names = (
        "test_requests_of_one_key_within_the_timeout_share_a_batch",
        "TestBatcherMachine",
        "test_a_lone_request_never_waits_but_callers_that_come_back_together_are_waited_for",
    )

    assert [examples_of(Tag(batching, 1, name, ("5",), "x"), "tests") for name in names] == [150, 60, 0]
    assert [
        line.partition(" runs ")[2][:11] for line in command.too_few([Tag(batching, 1, names[1], ("5",), "x")])
    ] == ["60 examples"]
