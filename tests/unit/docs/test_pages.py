"""What the pages name is there: files, headings, targets of the Makefile."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from workers.observe.observers import Observer, Observers
from workers.requests.ending import End, Ending
from workers.requests.inflight import InFlight

ROOT = Path(__file__).resolve().parents[3]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
PATH = re.compile(r"`((?:workers|producer|shared|tests|demo|config|docs)/[\w./-]+)`")
OF_USERS = {"config/system.yaml"}
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")


def anchors(page: Path) -> set[str]:
    """The names by which a page's headings can be linked to."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    """A file that was moved is found where the page says."""
    named = set(PATH.findall(page.read_text(encoding="utf-8")))

    assert {name for name in named if not (ROOT / name).exists()} <= OF_USERS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    """To a file that is there, and to a heading in it."""
    broken = []
    for name, heading in LINK.findall(page.read_text(encoding="utf-8")):
        target = page.parent / name if name else page
        if not target.exists() or (heading and heading not in anchors(target)):
            broken.append(f"{name}#{heading}")

    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_targets_that_a_page_names_are_in_the_makefile(page: Path) -> None:
    """Each ``make`` command of a page, in code, can be given."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    text = page.read_text(encoding="utf-8")
    code = [*re.findall(r"`(make [^`]+)`", text), *re.findall(r"^(make .+)$", text, re.MULTILINE)]

    named = {match[1] for command in code if (match := re.match(r"make ([a-z][a-z-]*)", command))}
    assert named <= targets


def test_the_observer_that_is_shown_observes() -> None:
    """The example of CONTRIBUTING.md, as it stands there."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = re.search(r"```python\n(class Counts.*?)\n\n\nself\.observers", text, re.DOTALL)
    assert shown is not None
    names = {"Observer": Observer, "Counter": Counter, "End": End, "Ending": Ending}
    exec(shown[1], names)  # noqa: S102  # of our own page

    counts = names["Counts"]()
    observers = Observers([counts])
    for _ in range(2):
        observers.tell("request_ended", Ending.cancelled(InFlight("7", "onnx", {}, {}, "", 1.0)))

    assert counts.ended == {End.CANCEL: 2}
    assert not observers.failures
