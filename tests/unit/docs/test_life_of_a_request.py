"""The page ``docs/life-of-a-request.md`` says what the code does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from celery import Celery

from shared.contract import EngineName
from shared.errors import EngineError
from workers.ends.settlements import settlement_of
from workers.hooks.events import Dispatcher
from workers.observe.celery_events import GROUP, CeleryEvents
from workers.requests.ending import FINAL, End, Ending
from workers.requests.inflight import InFlight, State
from workers.requests.table import NEXT

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs/life-of-a-request.md").read_text(encoding="utf-8")


def table(first_column: str) -> list[dict[str, str]]:
    """The rows of the page's table whose first column has this name."""
    lines = PAGE.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first_column} |"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def item() -> InFlight:
    headers = {"id": "one", "task": "muai.infer"}
    return InFlight("7", "onnx", headers, {}, '[[], {"request": {}}, {"chain": []}]', 1.0)


def ending(end: End) -> Ending:
    """An ending of this kind, where something failed if that can be."""
    return Ending(
        item(), end, error=None if end is End.RESULT else EngineError("it failed"), encoded=b"{}",
        to=EngineName.PYTORCH, here=EngineName.ONNX, reason="a reason",
    )  # fmt: skip


ENDS = {row["end"]: row for row in table("end")}


def test_the_transitions_are_those_of_the_table() -> None:
    """Each state may be followed by what the page says, and by nothing else."""
    written = [(row["from"], row["to"]) for row in table("from")]

    assert sorted(written) == sorted((state.value, after.value) for state in State for after in NEXT[state])


def test_who_moves_a_request_is_there() -> None:
    """The modules that the page names as owners stand in the rooms of a worker."""
    modules = {path.stem for path in (ROOT / "workers").glob("*/*.py")}
    owners = {name for row in table("from") for name in row["who moves it"].split(", ")}
    deciders = {name for row in ENDS.values() for name in row["decided by"].split(", ")}

    assert owners | deciders <= modules


def test_the_picture_shows_every_state() -> None:
    """A state that is not in the picture would be looked for in vain."""
    picture = (ROOT / "docs/life-of-a-request.svg").read_text(encoding="utf-8")
    shown = set(re.findall(r'<text class="name mid"[^>]*>([^<]+)<', picture))

    assert {state.value for state in State} <= shown


def test_there_are_no_other_ends() -> None:
    """The page has every way to end, once."""
    assert [row["end"] for row in table("end")] == [end.value for end in End]


@pytest.mark.parametrize("end", End)
def test_what_an_end_writes(end: End) -> None:
    """Its record, and where its message goes."""
    row, settlement = ENDS[end.value], settlement_of(ending(end))

    record = json.loads(settlement.record)["status"] if settlement.result_key else "none"
    assert row["record"] == record
    goes = {
        "gone": not settlement.push_list and not settlement.dead_reason and settlement.due_ms is None,
        "to the front of the next engine's queue": settlement.push_list == "pytorch" and settlement.push_front,
        "to the front of its queue": settlement.push_list == "=" and settlement.push_front,
        "waits in the broker for its time": settlement.due_ms is not None,
        "among the dead letters": bool(settlement.dead_reason),
    }
    assert [place for place, there in goes.items() if there] == [row["message"]]


@pytest.mark.parametrize("end", End)
def test_who_waits_on_a_final_end(end: End) -> None:
    """Its canvas goes on after a result, ends as its record says after any other final end, and else waits."""
    record, told = ENDS[end.value]["record"], ENDS[end.value]["the rest of its canvas"]
    if found := re.fullmatch(r"as after a (\w+)", told):
        told = ENDS[found[1]]["the rest of its canvas"]

    assert (told in ("waits", "was told before")) == (end not in FINAL)
    if end in FINAL - {End.RESULT}:
        assert told.startswith(f"later steps end with {record}, a chord's body with `ChordError`")
        assert ("link_error" in told) == (record == "FAILURE")


@pytest.mark.parametrize("end", End)
def test_which_event_an_end_sends(end: End) -> None:
    """Celery's event for it, through Celery's own dispatcher."""
    with Celery(broker="memory://") as app, app.connection_for_write() as connection:
        dispatcher = Dispatcher(connection, app=app, buffer_group=[GROUP])
        loop = SimpleNamespace(call_later=lambda *_: None)
        events = CeleryEvents(app)
        events.attach(SimpleNamespace(event_dispatcher=dispatcher, hub=loop))

        events.request_ended(ending(end))

        sent = dispatcher.buffered(GROUP)
        assert ([event.type for event in sent] or ["none"]) == [ENDS[end.value]["event"]]
