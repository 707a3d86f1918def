"""Chords on a broker that fails while their bodies are called: told again, the body is called, under the same id."""

from __future__ import annotations

from typing import Any

import pytest
import redis
from celery.app.task import Context
from celery.canvas import Signature, group
from kombu.exceptions import OperationalError

from shared import keys
from shared.contract import EngineName
from tests.support.memory_worker import settings_of
from workers.celery import create_app
from workers.hooks.backend import ChordBackend

GROUP = "members"
BODY = {
    "task": "muai.infer", "args": [], "kwargs": {}, "options": {"task_id": "body", "queue": "fake"},
    "subtask_type": None, "immutable": False,
}  # fmt: skip


@pytest.fixture
def backend(broker, redis_client) -> ChordBackend:
    """The backend of a worker's app, on which a chord of two members waits."""
    app = create_app(settings_of(EngineName.FAKE, redis_url=broker.url))
    found: ChordBackend = app.backend
    found.set_chord_size(GROUP, 2)
    return found


def end(backend: ChordBackend, number: int, state: str = "SUCCESS", result: Any = None) -> None:
    """A member has ended."""
    context = Context(id=f"member-{number}", group=GROUP, group_index=number, chord=dict(BODY))
    backend.on_chord_part_return(context, state, {"n": number} if result is None else result)


def calls(client: redis.Redis) -> list[bytes]:
    """The messages that wait in the queue of the body."""
    return client.lrange("fake", 0, -1)


def test_the_last_member_calls_the_body_with_the_answers(backend: ChordBackend, redis_client: redis.Redis) -> None:
    """In the members' order, once, however often an end is told."""
    end(backend, 1)
    end(backend, 1)
    assert calls(redis_client) == []

    end(backend, 0)
    end(backend, 0)

    (call,) = calls(redis_client)
    assert b'"id": "body"' in call or b'"id":"body"' in call
    assert not redis_client.keys("celery-taskset-meta-members.[jtsd]")


@pytest.mark.parametrize("where", ["_chord_part_return_script", "client", "call", "_chord_cleanup_script"])
def test_a_broker_that_fails_on_the_way_to_the_body_is_told_again(
    backend: ChordBackend, redis_client: redis.Redis, monkeypatch, where: str
) -> None:
    """After the script has run, while the answers are read, while the body is sent, before the chord is done."""
    end(backend, 0)

    def breaks(*_: Any, **__: Any) -> None:
        raise redis.ConnectionError("the broker is away")

    with monkeypatch.context() as patch:
        if where == "_chord_part_return_script":
            run = backend._chord_part_return_script
            patch.setitem(backend.__dict__, where, lambda **terms: (run(**terms), breaks()))
        elif where == "client":
            patch.setattr(backend.client, "zrange", breaks)
        elif where == "call":
            patch.setattr(Signature, "delay", lambda *_: (_ for _ in ()).throw(OperationalError("away")))
        else:
            patch.setitem(backend.__dict__, where, breaks)
        with pytest.raises((redis.ConnectionError, OperationalError)):
            end(backend, 1)
    end(backend, 1)

    assert len(calls(redis_client)) == (2 if where == "_chord_cleanup_script" else 1)
    assert redis_client.get(keys.result_key("body")) is None
    end(backend, 1)
    assert len(calls(redis_client)) == (2 if where == "_chord_cleanup_script" else 1)


def test_a_member_that_failed_fails_the_body(backend: ChordBackend, redis_client: redis.Redis) -> None:
    """It is not called."""
    end(backend, 0, "FAILURE", ValueError("no"))
    end(backend, 1)

    assert calls(redis_client) == []
    assert b"FAILURE" in redis_client.get(keys.result_key("body"))


def test_an_end_that_two_workers_tell_of_is_told_once(broker, backend: ChordBackend, redis_client: redis.Redis) -> None:
    """Both have seen that there is none yet: one record is written and published, and it stands."""
    heard = redis_client.pubsub(ignore_subscribe_messages=True)
    heard.subscribe(keys.result_key("later"))
    heard.get_message(timeout=5)
    none_yet = backend._get_task_meta_for("later")
    other: ChordBackend = create_app(settings_of(EngineName.FAKE, redis_url=broker.url)).backend
    for one, state in ((backend, "REVOKED"), (other, "FAILURE")):
        one._get_task_meta_for = lambda _: none_yet
        one.store_result("later", ValueError("no"), state)

    told = [message for _ in range(10) if (message := heard.get_message(timeout=0.1))]

    heard.close()
    assert len(told) == 1
    assert b"REVOKED" in redis_client.get(keys.result_key("later"))
    assert 0 < redis_client.ttl(keys.result_key("later")) <= 3600


ERRBACK = {**BODY, "options": {"task_id": "told", "queue": "fake"}}


@pytest.mark.parametrize("where", ["errback", "record"])
def test_a_broker_that_fails_while_a_body_is_failed_is_told_again(
    backend: ChordBackend, redis_client: redis.Redis, monkeypatch, where: str
) -> None:
    """Its failure is not the body's: nobody is told of it, and when it is back those are told who wait."""
    monkeypatch.setitem(BODY["options"], "link_error", [ERRBACK])
    end(backend, 0, "FAILURE", ValueError("no"))
    with monkeypatch.context() as patch:
        away = OperationalError("away") if where == "errback" else redis.ConnectionError("away")
        patch.setattr(*{"errback": (group, "apply_async"), "record": (backend, "_store_result")}[where],
                      lambda *_, **__: (_ for _ in ()).throw(away))  # fmt: skip
        with pytest.raises((OperationalError, redis.ConnectionError)):
            end(backend, 1)
    assert redis_client.get(keys.result_key("body")) is None

    end(backend, 1)

    assert b"ChordError" in redis_client.get(keys.result_key("body"))
    assert len(calls(redis_client)) == (1 if where == "errback" else 2)


def test_what_a_worker_publishes_is_not_listened_for(backend: ChordBackend, redis_client: redis.Redis, monkeypatch):
    """Where the broker is away, that would fail with an error that is not the broker's."""

    def away(*_: Any) -> None:
        raise RuntimeError("the result store backend is away")

    monkeypatch.setattr(backend.result_consumer, "consume_from", away)
    end(backend, 0)
    end(backend, 1)

    assert len(calls(redis_client)) == 1


def test_a_body_that_cannot_be_sent_has_failed(backend: ChordBackend, redis_client: redis.Redis, monkeypatch) -> None:
    """Whoever waits for it is told; also where it is the broker that would refuse it every time."""
    refusal = OperationalError("refused")
    refusal.__cause__ = redis.exceptions.NoPermissionError("no permission")
    monkeypatch.setattr(Signature, "delay", lambda *_: (_ for _ in ()).throw(refusal))

    end(backend, 0)
    end(backend, 1)

    assert b"FAILURE" in redis_client.get(keys.result_key("body"))


def test_a_header_with_groups_in_it_keeps_its_structure(backend: ChordBackend, monkeypatch) -> None:
    """The body gets lists in the places of the groups."""
    app = backend.app
    inner = app.GroupResult("inner", [app.AsyncResult("member-1")])
    header = app.GroupResult(GROUP, [app.AsyncResult("member-0"), inner])
    backend._set_chord_key(backend.get_key_for_group(GROUP), backend.encode({"result": header.as_tuple()}))
    found = []
    monkeypatch.setattr(Signature, "delay", lambda _, answers: found.append(answers))

    end(backend, 0)
    end(backend, 1)

    assert found == [[{"n": 0}, [{"n": 1}]]]


def test_answers_that_cannot_be_joined_fail_the_body(backend: ChordBackend, redis_client: redis.Redis) -> None:
    """The header names a member of which no answer came: whoever waits for the body is told, and it is not called."""
    app = backend.app
    inner = app.GroupResult("inner", [app.AsyncResult("somebody else")])
    header = app.GroupResult(GROUP, [app.AsyncResult("member-0"), inner])
    backend._set_chord_key(backend.get_key_for_group(GROUP), backend.encode({"result": header.as_tuple()}))

    end(backend, 0)
    end(backend, 1)

    assert calls(redis_client) == []
    record = redis_client.get(keys.result_key("body"))
    assert b"FAILURE" in record
    assert b"the body cannot be called" in record
