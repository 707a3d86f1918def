"""Senders that call the queues otherwise than the fleet does are found by ``muai doctor`` and ``muai status``."""

import json

import pytest

from shared.strays import is_read, reason_of, stray_lists
from tests.support.requests import ECHO, bare_app
from tests.support.shell import muai


@pytest.mark.parametrize(
    ("options", "send", "name", "reason"),
    [
        ({"global_keyprefix": "app:"}, {}, "app:fake", "has a global_keyprefix ('app:')"),
        ({"global_keyprefix": "app:"}, {"priority": 3}, r"app:fake\x06\x163", "has a global_keyprefix ('app:')"),
        ({"sep": ":"}, {"priority": 3}, "fake:3", "has another sep for priorities (':')"),
        ({"priority_steps": [0, 5]}, {"priority": 5}, r"fake\x06\x165", "has other priority_steps (one is 5)"),
        ({"sep": "-", "global_keyprefix": "a_"}, {"priority": 6}, "a_fake-6", "has another sep for priorities ('-'), "),
        ({}, {"queue": "celery"}, "celery", "no engine has a queue of this name"),
    ],
)  # fmt: skip
def test_lists_that_nobody_reads_are_found(make_fleet, options, send, name, reason):
    """With how many wait there, and what the sender does."""
    fleet = make_fleet()
    app = bare_app(fleet.url)
    app.conf.broker_transport_options = options
    for _ in range(2):
        app.send_task("muai.infer", kwargs={"request": ECHO}, **{"queue": "fake", **send})
    app.send_task("somebody.elses", queue="of-another-app")

    status, table = json.loads(muai(fleet, "status", "--json")[1]), muai(fleet, "status")[1]
    doctor = muai(fleet, "doctor")[1]

    ((stray),) = status["strays"]
    assert (stray["name"], stray["messages"]) == (name, 2)
    assert reason in stray["reason"]
    assert f"nobody reads the list {name} (2 waiting): " in table
    assert f"warn stray lists: 2 on {name}, which nobody reads: " in doctor


def test_what_the_fleet_reads_is_not_named(make_fleet):
    """Its own lists, lanes of tenants and other apps' lists are in order."""
    fleet = make_fleet()
    for priority in ("high", "normal", "low"):
        for tenant in ("default", "acme"):
            fleet.client.submit({**ECHO, "priority": priority, "tenant": tenant}, timeout=60)
    bare_app(fleet.url).send_task("somebody.elses", queue="theirs")

    assert fleet.client.stray_lists() == []
    assert "ok   stray lists: none" in muai(fleet, "doctor")[1]


def test_the_search_is_bounded(redis_client):
    """Of very many keys only so many are looked at."""
    redis_client.flushall()
    pipe = redis_client.pipeline(transaction=False)
    for number in range(20_000):
        pipe.set(f"key-{number}", 1)
    pipe.lpush("app:fake", b'{"headers": {"task": "muai.infer"}}')
    pipe.execute()

    assert [stray.name for stray in stray_lists(redis_client, 100_000)] == ["app:fake"]
    looked: list[int] = []
    scan = redis_client.scan
    redis_client.scan = lambda *args, **kwargs: (looked.append(1), scan(*args, **kwargs))[1]
    list(stray_lists(redis_client, 4000))
    assert len(looked) == 2


def test_reasons_name_what_is_different():
    """Of the name alone."""
    assert is_read("onnx")
    assert is_read("control\x06\x169")
    assert is_read("muai:lane:fake:acme")
    assert not is_read("prod.onnx")
    assert "global_keyprefix ('prod.')" in reason_of("prod.onnx\x06\x163")
