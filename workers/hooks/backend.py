"""Celery's Redis result backend, as this worker uses it: whoever waits on what follows a request is told, at once.

Checked against celery 5.7. What is overridden: ``restore_group``, whose result ``on_chord_part_return`` joins;
``_fail_chain`` and ``chord_error_from_stack``, which tell of a failure; ``mark_as_revoked``, which remote control
calls.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

from celery import states
from celery.app.task import Context
from celery.backends.redis import RedisBackend
from celery.canvas import Signature, group
from celery.exceptions import TaskRevokedError
from celery.result import GroupResult

from shared import keys, wire
from shared.broker import lua


class ChordBackend(RedisBackend):
    """The backend of a worker whose loop ends requests."""

    def restore_group(self, group_id: str, cache: bool = True) -> Any:
        """The saved results of a chord's header, where it has groups in it; nothing is waited for."""
        header = super().restore_group(group_id, cache=cache)
        return None if header is None else _JoinedParts(self, header)

    def chord_error_from_stack(self, callback: Signature, exc: BaseException | None = None) -> Any:
        """Fail the body of a chord, and with it the chord that the body is a member of."""
        info = super().chord_error_from_stack(callback, exc)
        for step in callback.tasks if isinstance(callback, group) else [callback]:
            self._part_failed(step, exc, states.FAILURE)
        return info

    def _fail_chain(
        self, chain: Any, exc: Any, traceback: Any = None, store_result: bool = True, state: str = states.FAILURE
    ) -> None:
        """Fail the steps that were to follow; what is answered or cancelled already keeps its record.

        The chord that a step is a member of is told before the step is marked: told twice does no harm, and what is
        tried again because the broker failed is not to find it marked and the chord not told.
        """
        for step in _calls(chain if isinstance(chain, Iterable) else ()):
            self._part_failed(step, exc, state)
            task_id = step.get("options", {}).get("task_id")
            if store_result and task_id is not None and self.get_state(task_id) not in states.READY_STATES:
                self.store_result(task_id, exc, state, traceback=traceback, request=_context(step))

    def _part_failed(self, step: Mapping[str, Any], exc: Any, state: str) -> None:
        if step.get("options", {}).get("chord"):
            self.on_chord_part_return(_context(step), state, exc)

    # -- cancelling -------------------------------------------------------------------------------------------------

    @cached_property
    def _cancel(self) -> Any:
        return self.client.register_script(lua("shared", "cancel"))

    def mark_as_revoked(
        self, task_id: str, reason: str = "", request: Any = None, store_result: bool = True,
        state: str = states.REVOKED,
    ) -> None:  # fmt: skip
        """Cancel what ``celery control revoke`` names as our own client does, so that every worker knows of it."""
        if request is not None or not store_result:
            super().mark_as_revoked(task_id, reason, request, store_result, state)
            return
        record = wire.failure_meta(task_id, TaskRevokedError(reason), status=state)
        self._cancel(keys=[keys.result_key(task_id), keys.CANCELLED], args=[record, int(self.expires)])


class _JoinedParts:
    """Stands for the results of a chord's header that has groups in it: they are taken from the parts that came in.

    Celery waits for the record of each. A worker that ends requests together tells their chords before it writes their
    records, and its loop, which is to write them, would wait for itself.
    """

    supports_native_join = True

    def __init__(self, backend: RedisBackend, header: GroupResult) -> None:
        self._backend = backend
        self._header = header

    def on_ready(self) -> None:
        """Nothing waits for it here."""

    def join_native(self, **_: Any) -> list[Any]:
        """The answers in the header's structure; raises :class:`~celery.exceptions.ChordError` for a failed part."""
        backend = self._backend
        rows = backend.client.zrange(backend.get_key_for_group(self._header.id, ".j"), 0, -1)
        answers = {backend.decode(row)[1]: backend._unpack_chord_result(row, backend.decode) for row in rows}

        def join(header: GroupResult) -> list[Any]:
            return [join(one) if isinstance(one, GroupResult) else answers[one.id] for one in header.results]

        return join(self._header)


def _calls(steps: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The calls whose results the steps of a chain stand for: a group's are its members, a chord's is its body."""
    left = deque(steps)
    while left:
        step = left.popleft()
        kind, inside = step.get("subtask_type"), step.get("kwargs") or {}
        if kind in ("group", "chain"):
            left.extend(inside.get("tasks") or ())
        elif kind == "chord":
            left.extend([inside["body"]] if inside.get("body") else ())
        yield step


def _context(step: Mapping[str, Any]) -> Context:
    """What Celery's backends read of a call that was not sent."""
    options = step.get("options") or {}
    return Context({**options, "id": options.get("task_id"), "group": options.get("group_id")})
