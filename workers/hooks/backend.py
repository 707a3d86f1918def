"""Celery's Redis result backend, as this worker uses it: whoever waits on what follows a request is told, at once.

Checked against celery 5.7. What is overridden: ``on_chord_part_return``, which calls the body of a chord;
``_fail_chain`` and ``chord_error_from_stack``, which tell of a failure; ``_set_with_state``, which writes records;
``mark_as_revoked``, which remote control calls; ``on_task_call``, which would listen for the results of what a worker
publishes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property, partial
from typing import Any

from celery import states
from celery.app.task import Context
from celery.backends.redis import RedisBackend
from celery.canvas import Signature, group, signature
from celery.exceptions import ChordError, TaskRevokedError
from celery.result import GroupResult

from shared import keys, wire
from shared.broker import lua, pool_of
from shared.headers import further_headers
from shared.masking import masked_url
from workers.broker.errors import BROKER_ERRORS, refused
from workers.ends.following import following

CLAIM, CLAIM_SECONDS, DONE_SECONDS = "muai", 10, 300
"""The name under which this fleet's workers call a chord's body, one for all of them, since each may go on with what
another has begun; for how long other workers leave it to them; and how long a chord that is done is remembered."""

_CHORD_KEYS = (".j", ".t", ".s", ".d", "", ".c")


class ChordBackend(RedisBackend):
    """The backend of a worker whose loop ends requests. From any thread.

    Where the broker is, the fleet says, as for the transport: the URL that Celery is told is not looked at.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._call = threading.local()

    def _params_from_url(self, url: str, defaults: dict[str, Any]) -> dict[str, Any]:
        return dict(defaults)

    def _get_pool(self, **params: Any) -> Any:
        return pool_of(self.app.fleet.settings.fleet)

    def as_uri(self, include_password: bool = False) -> str:
        """The broker's URL as it is shown."""
        return masked_url(self.app.fleet.settings.fleet.redis_url)

    def on_task_call(self, producer: Any, task_id: str) -> dict[str, Any]:  # Celery's signature
        """A worker does not wait for what it publishes: who waits for a result listens for it then.

        To listen would be another way to fail, and where the broker is away it fails with an error that is not the
        broker's.
        """
        return {}

    def on_chord_part_return(
        self, request: Context, state: str, result: Any, propagate: bool | None = None, **kwargs: Any
    ) -> None:
        """A member of a chord has ended; when all have, the body is called with their answers, or fails.

        What a broker that fails raises is raised: nothing is marked before the body is published, so all of it can be
        done again, and the body has the same id then. Celery would keep others from doing it for some seconds, and
        take the broker's failure for one of the chord.
        """
        group_id, index = request.group, request.group_index
        if not group_id or not request.id:
            return
        parts, more, size, done, header, claim = (self.get_key_for_group(group_id, key) for key in _CHORD_KEYS)
        part = self.encode([1, request.id, state, self.encode_result(result, state)])
        ready, added, expected, _ = self._chord_part_return_script(
            keys=[parts, more, size, done, header, claim],
            args=[
                request.id, part, int(self._chord_zset), "+inf" if index is None else index, self.chord_expires or 0,
                self._chord_result_expires, CLAIM_SECONDS, CLAIM,
            ],
        )  # fmt: skip
        if not expected or ready != int(expected) + int(added or 0):
            return
        body = signature(following(request.chord, further_headers(request.headers or {})), app=self.app)
        try:
            body.delay(self._answers(group_id))
        except BROKER_ERRORS as error:
            if not refused(error):
                raise
            self.chord_error_from_stack(body, ChordError(f"the broker refuses the body: {error}"))
        except ChordError as error:
            self.chord_error_from_stack(body, error)
        except Exception as error:  # noqa: BLE001  # the boundary: what cannot be joined or sent is the body's failure
            self.chord_error_from_stack(body, ChordError(f"the body cannot be called: {type(error).__name__}"))
        self._chord_cleanup_script(keys=[claim, parts, more, size, done], args=[CLAIM, DONE_SECONDS])

    def _answers(self, group_id: str) -> list[Any]:
        """The answers of a chord's members, in the header's structure; raises ``ChordError`` for one that failed.

        They are taken from the parts that came in. Where the header has groups in it Celery waits for the record of
        each: a worker that ends requests together tells their chords before it writes their records, and its loop,
        which is to write them, would wait for itself.
        """
        parts = self.get_key_for_group(group_id, ".j")
        rows = self.client.zrange(parts, 0, -1) if self._chord_zset else self.client.lrange(parts, 0, -1)
        header = self.restore_group(group_id)
        if header is None:
            return [self._unpack_chord_result(row, self.decode) for row in rows]
        answers = {self.decode(row)[1]: self._unpack_chord_result(row, self.decode) for row in rows}

        def join(group: GroupResult) -> list[Any]:
            return [join(one) if isinstance(one, GroupResult) else answers[one.id] for one in group.results]

        return join(header)

    def chord_error_from_stack(self, callback: Signature, exc: BaseException | None = None) -> Any:
        """Fail the body of a chord, and with it the chord that the body is a member of.

        Raises what a broker that fails raises: all of it can be done again. Celery takes it for the body's error, or
        passes over it.
        """
        outer: list[Exception] | None = getattr(self._call, "failures", None)
        self._call.failures = failures = list[Exception]()
        try:
            info = super().chord_error_from_stack(callback, exc)
        finally:
            self._call.failures = outer
        if failures:
            raise failures[0]
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

    def _call_task_errbacks(self, request: Any, exc: Any, traceback: Any) -> None:
        self._noting(partial(super()._call_task_errbacks, request, exc, traceback))

    def store_result(self, *args: Any, **kwargs: Any) -> Any:
        """Store a result."""
        return self._noting(partial(super().store_result, *args, **kwargs))

    def _noting(self, tell: Callable[[], Any]) -> Any:
        """While a body is failed: note that the broker has failed, and leave what is still to be told for later."""
        failures: list[Exception] | None = getattr(self._call, "failures", None)
        if failures:
            return None
        try:
            return tell()
        except BROKER_ERRORS as error:
            if failures is None or refused(error):
                raise
            failures.append(error)
            return None

    def _part_failed(self, step: Mapping[str, Any], exc: Any, state: str) -> None:
        if step.get("options", {}).get("chord"):
            self.on_chord_part_return(_context(step), state, exc)

    def _set_with_state(self, key: Any, value: Any, state: str) -> None:
        """Write a record. The first terminal one stands: two workers that find the same end tell of it at once."""
        if state in states.READY_STATES:
            self._cancel(keys=[key], args=[value, int(self.expires)])
        else:
            super()._set_with_state(key, value, state)

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
        self._cancel(
            keys=[keys.result_key(task_id), keys.CANCELLED], args=[record, int(self.expires), keys.CANCELLED_SECONDS]
        )


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
