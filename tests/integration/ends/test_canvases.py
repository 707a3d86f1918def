"""There is one way to end: whatever becomes of a request, whoever waits on it or on what follows it is told."""

from __future__ import annotations

import base64
import gc
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import redis
from celery import Celery, chain, chord, group
from celery.utils import uuid

from shared import keys
from tests.integration.ends.crew import BAD, QUICK, calls_on, fleet_on, infer, left_behind, undertaker
from tests.support.fleet import FleetUnderTest
from tests.support.requests import bare_app
from tests.support.waiting import eventually

QUIET_SECONDS = 20
"""How long nobody may be told anything while some still wait."""

FINAL = {"SUCCESS", "FAILURE", "REVOKED"}


def in_one(app: Celery, *names: Any) -> Any:
    """A chord of these, and its body."""
    return chord(list(names), infer(app))


PLACES: dict[str, Callable[[Celery, Any], Any]] = {
    "alone": lambda _, bad: bad,
    "in a group": lambda app, bad: group(infer(app), bad, infer(app)),
    "middle of a chain": lambda app, bad: chain(infer(app), bad, infer(app), infer(app)),
    "in a chord": lambda app, bad: in_one(app, infer(app), bad, infer(app)),
    "last of a chain in a chord": lambda app, bad: in_one(app, chain(infer(app), bad), infer(app)),
    "first of a chain": lambda app, bad: chain(bad, infer(app), infer(app)),
    "last of a chain": lambda app, bad: chain(infer(app), infer(app), bad),
    "first of a chain in a chord": lambda app, bad: in_one(app, chain(bad, infer(app), infer(app)), infer(app)),
    "in a group in a chord": lambda app, bad: in_one(app, chain(infer(app), group(infer(app), bad)), infer(app)),
    "in a chord in a chain": lambda app, bad: chain(infer(app), in_one(app, infer(app), bad), infer(app)),
    "in a chord before a chain": lambda app, bad: chord([infer(app), bad], chain(infer(app), infer(app))),
    "in a chord before a group": lambda app, bad: chord([infer(app), bad], group(infer(app), infer(app))),
    "in a chord in a chord": lambda app, bad: in_one(app, in_one(app, infer(app), bad), infer(app)),
    "in a chord before a group, in a chord": lambda app, bad: in_one(
        app, chord([infer(app), bad], group(infer(app), infer(app))), infer(app)
    ),
    "body of a chord": lambda app, bad: chord([infer(app), infer(app)], bad),
    "body of a chord in a chain": lambda app, bad: chain(infer(app), chord([infer(app), infer(app)], bad), infer(app)),
    "before a chord": lambda app, bad: chain(bad, in_one(app, infer(app), infer(app)), infer(app)),
    "before a chord that is last": lambda app, bad: chain(bad, group(infer(app), infer(app)), infer(app)),
    "before a group": lambda app, bad: chain(bad, group(infer(app), infer(app))),
    "before a chain and a group": lambda app, bad: chain(
        bad, infer(app), group(infer(app), chain(infer(app), infer(app)))
    ),
    "called back": lambda app, bad: infer(app, link=[bad]),
}  # fmt: skip
USUAL = list(PLACES)[:5]
EVERYWHERE = ("engine error", "cancelled before", "deep headers")
"""Ends that are tried in every place: they are found by three different parts of a worker."""

LARGE = ("too large", "far too large", "large headers")
"""Ends by what a step before them carries as well."""

CHORDS = [place for place in PLACES if re.match(r"in a chord|.* in a chord$", place) and "group" not in place]
"""Where Celery tells of the end of a chord's member by a ChordError."""

CASES = [(name, place) for name in BAD for place in (PLACES if name in EVERYWHERE else USUAL)]


@pytest.fixture(scope="module")
def fleet(broker, tmp_path_factory) -> Iterator[FleetUnderTest]:
    """One quick worker for the module."""
    with fleet_on(broker, 1, tmp_path_factory.mktemp("ends"), QUICK) as made, undertaker(made.url):
        yield made


@pytest.fixture(scope="module")
def app(fleet: FleetUnderTest) -> Iterator[Celery]:
    """A bare app of its users."""
    with bare_app(fleet.url) as app:
        yield app


@pytest.fixture(scope="module")
def client(fleet: FleetUnderTest) -> Iterator[redis.Redis]:
    """A look into the broker."""
    with redis.Redis.from_url(fleet.url) as made:
        yield made


@dataclass
class Case:
    """A canvas that was sent, with the id of the request in it that is to end, and of those that are waited on."""

    request_id: str
    mark: str
    waited: list[str]


@dataclass
class Told:
    """What there is to know under an id."""

    state: str
    error: str
    says: str


@pytest.fixture(scope="module")
def sent(fleet: FleetUnderTest, app: Celery) -> dict[tuple[str, str], Case]:
    """All of them, sent at once."""
    cases = {}
    for name, place in CASES:
        bad, request_id, mark = BAD[name], uuid(), uuid()
        errback = app.signature("clean.up", kwargs={"mark": mark}, queue="errbacks")
        if bad.first is not None:
            bad.first(fleet, app, request_id)
        call = infer(app, **{"task_id": request_id, "link_error": [errback], **bad.options})
        result = PLACES[place](app, call).apply_async()
        waited = [one.id for one in getattr(result, "results", [result])]
        cases[name, place] = Case(request_id, mark, waited)
    for (name, _), case in cases.items():
        then = BAD[name].then
        if then is not None:
            then(fleet, app, case.request_id)
    gc.collect()  # the results, which are not waited on by themselves
    return cases


@pytest.fixture(scope="module")
def told(sent: Mapping[Any, Case], client: redis.Redis) -> dict[str, Told]:
    """What those who wait are told, by the id that they wait on. Nothing in time is missing."""
    open_ids = {request_id for case in sent.values() for request_id in case.waited}
    asked = sorted(open_ids | {case.request_id for case in sent.values()})
    found: dict[str, Told] = {}
    moved = time.monotonic()
    while open_ids - found.keys() and time.monotonic() - moved < QUIET_SECONDS:
        before = len(found)
        for request_id, record in zip(asked, client.mget(list(map(keys.result_key, asked))), strict=True):
            data = json.loads(record) if record else {}
            if data.get("status") in FINAL:
                error = data["result"] if data["status"] != "SUCCESS" else {}
                found[request_id] = Told(data["status"], str(error.get("exc_type")), str(error.get("exc_message")))
        moved = time.monotonic() if len(found) > before else moved
        time.sleep(0.05)
    return found


@pytest.mark.parametrize(("name", "place"), CASES)
def test_whoever_waits_is_told(name: str, place: str, sent, told) -> None:
    """The request's own end is its own error; what was to follow ends too, as Celery's own worker would end it."""
    bad, case = BAD[name], sent[name, place]

    own, waited = told.get(case.request_id), [told.get(request_id) for request_id in case.waited]

    assert None not in waited
    if own is not None:
        assert own.state == bad.state
        assert re.search(bad.error, own.error)
        assert re.search(bad.says, own.says)
        if place in CHORDS:
            assert [one.error for one in waited] == ["ChordError"]
            assert bad.error.partition("|")[0] in waited[0].says or bad.error.partition("|")[2] in waited[0].says
    if place == "in a group":
        assert [one.state for one in waited] == ["SUCCESS", bad.state, "SUCCESS"]


def test_callbacks_for_errors_are_called_once_and_after_failures_only(sent, told, client) -> None:
    """Nobody cancels by mistake: there is nothing to clean up after what was cancelled or has expired."""
    failed = Counter(
        case.mark for (name, place), case in sent.items() if BAD[name].state == "FAILURE" and case.request_id in told
        # A step before it carries what is too large, and has failed in its place.
        and not (name in LARGE and place in ("middle of a chain", "last of a chain in a chord"))
    )  # fmt: skip

    eventually(lambda: len(calls_on(client, "errbacks")) >= failed.total(), what="the callbacks")
    assert Counter(call["mark"] for call in calls_on(client, "errbacks")) == failed


def test_a_body_is_given_the_structure_of_its_header(app: Celery, client: redis.Redis) -> None:
    """Groups in the header of a chord are lists in what its body works on, and no worker waits for itself over it."""
    header = [chain(infer(app, "a"), group(infer(app, "b"), infer(app, "c"))), infer(app, "d")]

    chord(header, app.signature("collect", queue="bodies")).apply_async()

    (message,) = eventually(lambda: client.lrange("bodies", 0, -1), what="the call of the body")
    ((first, last),) = json.loads(base64.b64decode(json.loads(message)["body"]))[0]
    assert [[one["outputs"]["text"] for one in first], last["outputs"]["text"]] == [["b", "c"], "d"]


def test_nothing_is_left_behind(sent, told, client, app) -> None:
    """What has ended is under way no longer: in no list, no lease, no set, and not in what a worker shows."""
    eventually(lambda: not left_behind(client), what="the end of what is kept of those under way")

    inspect = app.control.inspect(timeout=5)
    assert [*inspect.active().values(), *inspect.reserved().values()] == [[], []]
