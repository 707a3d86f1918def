"""What Celery does after a task that is part of a chain, a group, a chord, or has callbacks.

The next steps are published before the request's own record is written, so a worker that dies in between repeats them
under the same ids; none is lost.
"""

from __future__ import annotations

from typing import Any

from celery import Celery, signature
from celery.canvas import Signature
from celery.result import AsyncResult

from shared.errors import FleetError
from workers.observe.celery_events import request_context
from workers.requests.inflight import InFlight


class Canvas:
    """Continues canvases through the app that runs the worker."""

    def __init__(self, app: Celery) -> None:
        self._app = app

    def succeeded(self, item: InFlight, result: dict[str, Any]) -> list[Any]:
        """Publish what follows a success; returns the children for the result record."""
        embed = _canvas_of(item)
        if embed is None:
            return []
        options = {"parent_id": item.id, "root_id": item.headers.get("root_id"), "priority": item.priority}
        children: list[AsyncResult[Any]] = [
            self._signature(callback).apply_async((result,), **options) for callback in embed.get("callbacks") or ()
        ]
        rest = list(embed.get("chain") or ())
        if rest:
            children.append(self._signature(rest.pop()).apply_async((result,), chain=rest, **options))
        if embed.get("chord"):
            self._app.backend.on_chord_part_return(request_context(item, embed), "SUCCESS", result)
        return [child.as_tuple() for child in children]

    def failed(self, item: InFlight, error: FleetError) -> None:
        """Tell the rest of the canvas that this step failed, as Celery does."""
        embed = _canvas_of(item)
        if embed is not None:
            self._app.backend.mark_as_failure(
                item.id, error, request=request_context(item, embed), store_result=True, call_errbacks=True
            )

    def _signature(self, data: dict[str, Any]) -> Signature:
        return signature(data, app=self._app)


def _canvas_of(item: InFlight) -> dict[str, Any] | None:
    embed = item.embed
    if embed and any(embed.get(part) for part in ("callbacks", "errbacks", "chain", "chord")):
        return embed
    return None
