"""``python -m tests.traceability`` writes docs/properties.md; with ``--check`` it only says whether that is stale.

Nothing is written, and the exit status is 1, where a tag is wrong, where what is due has no test, or where a property's
test runs too few examples.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.traceability.page import page, problems
from tests.traceability.tags import LEAST_EXAMPLES, Tag, TagError, examples_of, tags_in

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
DOCUMENT = ROOT / "docs" / "properties.md"


def main(arguments: list[str]) -> int:
    """Write the page, or with ``--check`` only compare; 1 where something is wrong or the page was out of date."""
    try:
        tags = tags_in(TESTS)
    except TagError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    found = [*problems(tags, TESTS), *too_few(tags)]
    if found:
        sys.stderr.write("\n".join(found) + "\n")
        return 1
    text = page(tags)
    if "--check" in arguments:
        stale = not DOCUMENT.exists() or DOCUMENT.read_text(encoding="utf-8") != text
        if stale:
            sys.stderr.write("docs/properties.md is out of date; run: python -m tests.traceability\n")
        return int(stale)
    DOCUMENT.write_text(text, encoding="utf-8")
    return 0


def too_few(tags: list[Tag]) -> list[str]:
    """The tests of properties that run fewer examples than they should, a line each."""
    counted = [(tag, examples_of(tag, TESTS.name)) for tag in tags if tag.of_property]
    return [
        f"{tag.place}: {tag.test} runs {count} examples; a property's test runs {LEAST_EXAMPLES} or more"
        for tag, count in counted
        if count < LEAST_EXAMPLES
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
