"""Callers with nothing but Celery: calls, chains, groups and chords, delayed, expiring and revoked."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import redis
from celery import Celery, chain, chord, group
from celery.exceptions import TimeoutError as CeleryTimeout
from celery.result import AsyncResult
from kombu.exceptions import OperationalError

from shared.contract import TASK_NAME, Priority
from tests.faults.anything.composition import Ask, Caller
from tests.faults.anything.scene import Scene
from tests.faults.ledger import text_of
from workers.engines import fake

AWAY = (OperationalError, redis.RedisError, OSError, RuntimeError, AttributeError)
"""What a Celery app raises while its broker is away; the last two from parts that have lost it."""


def app_of(scene: Scene, caller: Caller) -> Celery:
    """An app as another project has it."""
    url = scene.url(caller)
    app = Celery(broker=url, backend=url, set_as_current=False)
    app.conf.update(
        broker_connection_retry=False, redis_socket_timeout=3,
        result_backend_transport_options={"retry_policy": {"max_retries": 1}},
        broker_transport_options={"socket_timeout": 5},
    )  # fmt: skip
    return app


def _options(caller: Caller, ask: Ask) -> dict[str, Any]:
    options: dict[str, Any] = {"queue": caller.queue, "task_id": ask.own_id, "priority": Priority(ask.priority).wire}
    if caller.countdown is not None:
        if caller.eta:
            options["eta"] = datetime.now(UTC) + timedelta(seconds=caller.countdown)
        else:
            options["countdown"] = caller.countdown
    if caller.expires is not None:
        options["expires"] = caller.expires + (caller.countdown or 0.0)
    return options


def _request(ask: Ask, *, inputs: bool = True) -> dict[str, Any]:
    return {"request": {name: value for name, value in ask.request(inputs=inputs).items() if name != "id"}}


def sending(scene: Scene, caller: Caller) -> None:
    """Sends each, revokes some, and waits for one after the other."""
    app = app_of(scene, caller)
    sent = [ask for ask in caller.asks if _send(scene, caller, app, ask)]
    scene.book.sent_in_order(sent)
    _revoke(scene, caller, app)
    _wait(scene, caller, app, sent)


def _send(scene: Scene, caller: Caller, app: Celery, ask: Ask) -> bool:
    scene.book.sending(ask, caller)
    for _ in scene.tries():
        try:
            app.send_task(TASK_NAME, kwargs=_request(ask), **_options(caller, ask))
        except AWAY as error:
            scene.book.hindered([ask], error)
            time.sleep(0.1)
            app = app_of(scene, caller)
        except UnicodeEncodeError as error:  # its own encoder's
            scene.book.refused(ask, error)
            return False
        else:
            scene.book.accepted([ask])
            time.sleep(caller.pace)
            return True
    scene.book.refused(ask, TimeoutError(), unsure=True)
    return False


def _revoke(scene: Scene, caller: Caller, app: Celery) -> None:
    if caller.cancels:
        time.sleep(caller.cancel_after)
        for ask in caller.asks[: caller.cancels]:
            scene.book.cancelling(ask.id)
            with suppress(*AWAY):
                app.control.revoke(ask.own_id)


def _wait(scene: Scene, caller: Caller, app: Celery, asks: Sequence[Ask]) -> None:
    for ask in asks:
        with suppress(CeleryTimeout):
            scene.book.told(ask.id, _told(scene, caller, app, ask.own_id))


def _told(scene: Scene, caller: Caller, app: Celery, request_id: str) -> str:
    """What waiting for a result gives.

    Celery does not see every end whose news is lost while its broker is away: then it is asked again, and an app that
    has lost its broker for good is made anew.
    """
    longest = 2.0 if scene.made.faults else 1e9
    while True:
        found = AsyncResult(request_id, app=app)
        try:
            value = found.get(
                timeout=max(0.5, min(longest, scene.patience())), propagate=False, disable_sync_subtasks=False
            )
            if found.state == "SUCCESS":
                return text_of(value["outputs"])
            return f"!{type(value).__name__}"
        except CeleryTimeout:
            if scene.patience() <= 0:
                raise
        except AWAY:
            if scene.patience() <= 0:
                raise CeleryTimeout from None
            time.sleep(0.1)
            app = app_of(scene, caller)
        finally:
            with suppress(*AWAY):
                found.backend.remove_pending_result(found)
            found.backend = None  # else it tries that again, when nobody is there to hear of its failure


def again(scene: Scene, caller: Caller) -> None:
    """Sends each id twice."""
    app = app_of(scene, caller)
    for _ in range(2):
        sent = [ask for ask in caller.asks if _send(scene, caller, app, ask)]
    _wait(scene, caller, app, sent)


# --- canvases -----------------------------------------------------------------------------------------------------


def _signature(app: Celery, caller: Caller, ask: Ask, *, inputs: bool = True) -> Any:
    return app.signature(TASK_NAME, kwargs=_request(ask, inputs=inputs), options=_options(caller, ask))


def _published(scene: Scene, caller: Caller, canvas: Any) -> bool:
    """Whether the canvas was sent whole; if not, nobody knows what of it was."""
    try:
        canvas.apply_async()
    except AWAY as error:
        for ask in caller.asks:
            scene.book.refused(ask, error, unsure=True)
        return False
    scene.book.accepted(caller.asks)
    return True


def _answer(ask: Ask) -> str | None:
    found = fake.answer(ask.parsed())
    return None if isinstance(found, Exception) else text_of(found.outputs)


def chained(scene: Scene, caller: Caller) -> None:
    """A chain: each step after the first works on the answer of the one before. The last one is waited for."""
    app = app_of(scene, caller)
    answer: str | None = None
    for place, ask in enumerate(caller.asks):
        answer = _answer(ask) if place == 0 else None if answer is None else answer[::-1]
        before = caller.asks[place - 1].id if place else None
        awaited = place == len(caller.asks) - 1
        scene.book.sending(ask, caller, expected=answer if place else None, after=before, awaited=awaited)
    steps = [_signature(app, caller, ask, inputs=place == 0) for place, ask in enumerate(caller.asks)]
    if _published(scene, caller, chain(*steps)):
        _revoke(scene, caller, app)
        _wait(scene, caller, app, caller.asks[-1:])


def grouped(scene: Scene, caller: Caller) -> None:
    """A group: all are waited for."""
    app = app_of(scene, caller)
    for ask in caller.asks:
        scene.book.sending(ask, caller)
    if _published(scene, caller, group([_signature(app, caller, ask) for ask in caller.asks])):
        _revoke(scene, caller, app)
        _wait(scene, caller, app, caller.asks)


def chord_awaited(scene: Scene, caller: Caller) -> None:
    """A chord: members and body are waited for."""
    _chord(scene, caller, caller.asks)


def body_awaited(scene: Scene, caller: Caller) -> None:
    """A chord whose caller holds only the id of its body."""
    _chord(scene, caller, caller.asks[-1:])


def _chord(scene: Scene, caller: Caller, awaited: Sequence[Ask]) -> None:
    app = app_of(scene, caller)
    *members, body = caller.asks
    for ask in members:
        scene.book.sending(ask, caller, awaited=ask in awaited)
    answers = [_answer(ask) for ask in members]
    whole = None if None in answers else "\n".join(answer for answer in answers if answer is not None)[::-1]
    scene.book.sending(body, caller, expected=whole, members=tuple(ask.id for ask in members))
    canvas = chord(
        [_signature(app, caller, ask) for ask in members], _signature(app, caller, body, inputs=False)
    )  # fmt: skip
    if _published(scene, caller, canvas):
        _revoke(scene, caller, app)
        _wait(scene, caller, app, awaited)
