"""What Celery does after a task that is part of a chain, a group, a chord, or has callbacks.

It is done before the request's own end is written, so a worker that dies in between repeats it under the same ids;
nothing is lost.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from uuid import NAMESPACE_OID, uuid5

from celery import Celery, signature
from celery.canvas import Signature
from celery.result import AsyncResult
from kombu.utils import json

from shared.errors import UndecodableMessage, WrongSignature
from shared.headers import further_headers
from shared.signing import Signer
from workers.broker.errors import BROKER_ERRORS, refused
from workers.ends.following import following
from workers.observe.celery_events import request_context
from workers.requests.ending import FINAL, End, Ending
from workers.requests.inflight import CANVAS, InFlight, carries_canvas

logger = logging.getLogger(__name__)


class Canvas:
    """Continues canvases, or ends them, through the app that runs the worker."""

    def __init__(self, app: Celery, signer: Signer) -> None:
        self._app = app
        self._signer = signer

    def tell(self, ending: Ending) -> list[Any]:
        """Let the rest of a canvas know how a request of it ends, where that is final.

        Returns the steps that were published, for the record of a success.
        """
        if ending.end is End.RESULT:
            embed = ending.item.embed
            return self._go_on(ending.item, _read(embed), ending.result) if embed and carries_canvas(embed) else []
        if ending.end in FINAL:
            embed = self._embed(ending.item)
            if embed:
                self._stop(ending, embed)
        return []

    def _go_on(self, item: InFlight, embed: dict[str, Any], result: Mapping[str, Any] | None) -> list[Any]:
        options = {"parent_id": item.id, "root_id": item.headers.get("root_id"), "priority": item.priority}
        further = further_headers(item.headers)
        children: list[AsyncResult[Any]] = [
            self._signature(following(callback, further)).apply_async((result,), **options)
            for callback in _named(embed.get("callbacks"), item.id)
        ]
        rest = list(embed.get("chain") or ())
        if rest:
            step = self._signature(following(rest.pop(), further))
            children.append(step.apply_async((result,), chain=rest, **options))
        if embed.get("chord"):
            self._app.backend.on_chord_part_return(request_context(item, embed), "SUCCESS", result)
        return [child.as_tuple() for child in children]

    def _stop(self, ending: Ending, embed: dict[str, Any]) -> None:
        """Tell whoever waits for a later step, or for the body of the chord. The request's own record is not written.

        Callbacks for errors are called after a failure only, as Celery does it: nobody cancels by mistake.
        """
        revoked = ending.end in (End.CANCEL, End.EXPIRY)
        state, error = "REVOKED" if revoked else "FAILURE", ending.error
        context, backend = request_context(ending.item, embed), self._app.backend
        told: list[Callable[[], Any]] = [partial(backend._fail_chain, embed.get("chain"), error, state=state)]
        if embed.get("chord"):
            told.append(partial(backend.on_chord_part_return, context, state, error))
        if embed.get("errbacks") and not revoked:
            further = further_headers(ending.item.headers)
            errbacks = _named(embed["errbacks"], f"{ending.item.id}/error")
            context.errbacks = [following(errback, further) for errback in errbacks]
            told.append(partial(backend._call_task_errbacks, context, error, None))
        problems: list[Exception] = []
        for tell in told:  # what is wrong with one of them is not to keep another waiting
            try:
                tell()
            except BROKER_ERRORS as problem:
                if not refused(problem):
                    raise
                problems.append(problem)
            except Exception as problem:  # noqa: BLE001  # it is raised when all were told
                problems.append(problem)
        if problems:
            raise problems[0]

    def _embed(self, item: InFlight) -> dict[str, Any] | None:
        """The canvas of a request that may have ended before its message was read, and is to be believed."""
        embed = item.embed
        if embed is None:
            try:
                embed = item.decode()[2]
            except UndecodableMessage:
                return None
        if not carries_canvas(embed):
            return None
        try:
            self._signer.check({"headers": item.headers, "body": item.body})
        except WrongSignature:
            return None
        return _read(embed)

    def _signature(self, data: dict[str, Any]) -> Signature:
        return signature(data, app=self._app)


def _read(embed: Mapping[str, Any]) -> dict[str, Any]:
    """A canvas with the times and other values that kombu writes in a form of its own."""
    read: dict[str, Any] = json.loads(json.dumps({part: embed.get(part) for part in CANVAS}))
    return read


def _named(steps: Sequence[dict[str, Any]] | None, name: str) -> list[dict[str, Any]]:
    """Callbacks with the ids under which they are called, however often: Celery leaves that to each call."""
    return [
        {**step, "options": {"task_id": str(uuid5(NAMESPACE_OID, f"{name}/{number}")), **(step.get("options") or {})}}
        for number, step in enumerate(steps or ())
    ]
