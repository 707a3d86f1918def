"""``make faults``: the faults at full size. Prints a table, a ``name: value`` line per figure, and ends with 1 where a
bar is missed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.faults.anything.composition import Composition
from tests.faults.anything.seeds import run_one
from tests.faults.stage import Figure
from tests.faults.suite import SCENARIOS

KEPT = Path(".muai/faults")
"""Where compositions that fail are left, unless another folder is named."""


def main() -> int:
    """Run the scenarios that were asked for."""
    parser = argparse.ArgumentParser(
        prog="make faults", description="Break the fleet on purpose and see what comes of it."
    )
    parser.add_argument("--only", default="", help="names of scenarios, with commas: " + ", ".join(SCENARIOS))
    parser.add_argument("--minutes", type=float, default=30.0, help="length of the soak")
    parser.add_argument("--short", action="store_true", help="the size that runs with the tests")
    parser.add_argument("--seed", type=int, help="the first seed of `anything`; one run of it, unless --runs says more")
    parser.add_argument("--runs", type=int, help="how many seeds of `anything`, each after the other")
    parser.add_argument("--no-shrink", action="store_true", help="leave what fails as it is")
    parser.add_argument("--composition", type=Path, help="a file with a composition of `anything`, to run it again")
    parser.add_argument("--keep", type=Path, help="keep logs and ledgers in this folder")
    options = parser.parse_args()
    names = [name for name in options.only.split(",") if name] or [name for name in SCENARIOS if name != "soak"]
    if unknown := sorted(set(names) - set(SCENARIOS)):
        parser.error(f"there is no {', '.join(unknown)}; there are: {', '.join(SCENARIOS)}")
    SCENARIOS["soak"].full["minutes"] = options.minutes
    if options.composition is not None:
        return int(bool(run_one(options.keep or KEPT, Composition.from_json(options.composition.read_text()))))
    if options.seed is not None or options.runs is not None:
        if options.no_shrink:
            SCENARIOS["anything"].full["shrink"] = 0.0
        first = options.seed or 0
        SCENARIOS["anything"].full["seeds"] = range(first, first + (options.runs or 1))
    found: list[tuple[str, Figure]] = []
    with tempfile.TemporaryDirectory(prefix="muai-faults-") as temporary:
        for name in names:
            folder = (options.keep or (KEPT if name == "anything" else Path(temporary))) / name
            found += [(name, figure) for figure in measured(name, folder, options.short)]
    console = Console()
    console.print(table(found))
    for name, figure in found:
        print(f"{name}/{figure.name}: {figure.value:g}")
    return int(not all(figure.met for _, figure in found))


def measured(name: str, folder: Path, short: bool) -> list[Figure]:
    """The figures of a scenario; one that cannot be run to its end has missed its bar."""
    print(f"{name} ...", flush=True)
    began = time.monotonic()
    scenario = SCENARIOS[name]
    try:
        figures = scenario.in_short(folder) if short else scenario.at_full_size(folder)
    except Exception:
        traceback.print_exc()
        figures = [Figure("broken off", 1, at_most=0)]
    for figure in figures:
        print(f"  {figure.name}: {figure.value:g}  {figure.bar}{'' if figure.met else '  MISSED'}", flush=True)
    return [*figures, Figure("seconds", round(time.monotonic() - began))]


def table(found: list[tuple[str, Figure]]) -> Table:
    """All figures with their bars."""
    shown = Table("fault", "figure", "value", "bar", "", title="What was broken on purpose")
    last = ""
    for name, figure in found:
        mark = "" if not figure.bar else "ok" if figure.met else "MISSED"
        shown.add_row(name if name != last else "", figure.name, f"{figure.value:g}", figure.bar, mark)
        last = name
    return shown


if __name__ == "__main__":
    sys.exit(main())
