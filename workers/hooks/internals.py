"""What this project relies upon of its libraries beyond what they document, and whether it is still as it was checked.

:data:`RELIED_UPON` is written by hand: which file here overrides, calls or imitates what, and what for. What these
were when they were last read (the versions, and a fingerprint of each one's source) is kept in ``internals.json``
beside it, which ``python -m workers.hooks.internals --record`` writes. Without ``--record`` the command says what has
changed since; ``tests/unit/hooks/test_internals.py`` fails for each, and a worker warns of other versions at its start.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

COMMAND = "python -m workers.hooks.internals --record"

KEPT = Path(__file__).with_name("internals.json")

RELIED_UPON: Mapping[str, Mapping[str, str]] = {
    "workers/hooks/transport.py": {
        "kombu.transport.redis.Transport.__init__": "makes the poller that ours takes the place of",
        "kombu.transport.redis.Transport.register_with_event_loop": "overridden: its callback on each tick is removed",
        "kombu.transport.redis.MultiChannelPoller.__init__": "has _channels, _fd_to_chan, _chan_to_sock and poller",
        "kombu.transport.redis.MultiChannelPoller._register_BRPOP": "overridden: the waiting connection's socket",
        "kombu.transport.redis.MultiChannelPoller._register_LISTEN": "called for remote control",
        "kombu.transport.redis.MultiChannelPoller._update_brpop_polling": "overridden: does nothing",
        "kombu.transport.redis.MultiChannelPoller.get": "overridden: claims first where there is no loop",
        "kombu.transport.redis.MultiChannelPoller.on_poll_start": "overridden: claims, then asks to be woken",
        "kombu.transport.redis.MultiChannelPoller.on_readable": "overridden: no prefetch limit holds a socket back",
        "kombu.transport.redis.MultiChannelPoller.maybe_refresh_binding_expiry": "overridden: outlives a broken broker",
        "kombu.transport.redis.MultiChannelPoller.maybe_check_brpop_health": "overridden: asks the waiting connection",
        "kombu.transport.redis.Channel.__init__": "sets what the transport options name, and the handlers by kind",
        "kombu.transport.redis.Channel.from_transport_options": "extended by our own option",
        "kombu.transport.redis.Channel._get_pool": "overridden: where the broker is, the fleet's settings say",
        "kombu.transport.redis.Channel._connparams": "its connections tell the channel when they are closed; ours do",
        "kombu.transport.redis.Channel._on_connection_disconnect": "called when one is",
        "kombu.connection.Connection.__init__": "leaves a URL alone where the transport can parse it",
        "kombu.connection.Connection.as_uri": "asks such a transport",
        "kombu.transport.base.Transport.as_uri": "overridden: the broker's URL without its password",
        "kombu.transport.redis.Channel.async_pool": "where the waiting connection comes from",
        "kombu.transport.redis.Channel.active_queues": "which queues are consumed now",
        "kombu.transport.redis.Channel._brpop_read": "overridden: reads the waiting connection",
        "kombu.transport.redis.Channel._queue_bind": "overridden: a full broker binds later",
        "kombu.transport.redis.Channel._purge": "overridden: tenants' lanes too",
        "kombu.transport.redis.Channel._size": "overridden: tenants' lanes too",
        "kombu.transport.redis.Channel._get": "overridden: claims one",
        "kombu.transport.redis.Channel.basic_consume": "overridden: notes who does not acknowledge",
        "kombu.transport.redis.Channel.close": "overridden: closes the waiting connection first",
        "kombu.transport.redis.Channel.basic_get": "overridden: settles what is not acknowledged",
        "kombu.transport.redis.Channel.prepare_message": "overridden: signs",
        "kombu.transport.redis.Channel.message_to_python": "overridden: decompresses nothing",
        "kombu.transport.redis.Transport._deliver": "hands what is no request to Celery's consumer",
        "kombu.transport.virtual.base.QoS.__init__": "has _delivered, _dirty, _quick_ack and _on_collect",
        "kombu.transport.virtual.base.QoS._flush": "called before what is open is given back",
        "kombu.transport.redis.Channel._put_fanout": "overridden: keeps how many have heard a message",
        "kombu.transport.redis.QoS.append": "stepped over: leases take the place of its index",
        "kombu.transport.virtual.base.QoS.append": "overridden: holds the lease",
        "kombu.transport.virtual.base.QoS.ack": "overridden: ends the lease",
        "kombu.transport.virtual.base.QoS.reject": "overridden: ends the lease",
        "kombu.transport.virtual.base.QoS.restore_unacked_once": "overridden: gives leases back",
        "kombu.transport.virtual.base.QoS.restore_visible": "overridden: the sweeper does it",
        "redis.connection.Connection.connect": "the waiting connection has a socket, _sock, afterwards",
        "redis.connection.Connection.disconnect": "and none, None, afterwards",
        "redis.connection.Connection.can_read": "whether more has come; true where it was closed",
        "redis._parsers.hiredis._HiredisParser.can_read": "the same",
        "redis._parsers.hiredis._HiredisParser.read_response": "returns what the broker pushed, when asked to",
    },
    "workers/hooks/backend.py": {
        "celery.backends.base.Backend.as_uri": "overridden: the broker's URL without its password",
        "celery.backends.redis.RedisBackend.__init__": "hands its URL to _params_from_url",
        "celery.backends.redis.RedisBackend._create_client": "makes its client of the pool",
        "celery.backends.redis.RedisBackend._get_pool": "overridden: where the broker is, the fleet's settings say",
        "celery.backends.redis.RedisBackend._params_from_url": "overridden: nothing is read off the URL",
        "celery.backends.base.Backend.restore_group": "the header of a chord with groups in it, or nothing",
        "celery.backends.base.Backend._call_task_errbacks": "overridden: a broker that fails is not an error of it",
        "celery.backends.base.Backend.store_result": "overridden: likewise",
        "celery.backends.redis.RedisBackend.on_task_call": "overridden: nothing is listened for",
        "celery.backends.base.Backend.chord_error_from_stack": "overridden: the chord that the body is in is told too",
        "celery.backends.base.Backend.mark_as_revoked": "overridden: what remote control revokes is cancelled",
        "celery.backends.redis.RedisBackend._set_with_state": "overridden: the first terminal record stands",
        "celery.backends.redis.RedisBackend._unpack_chord_result": "a part's answer, or ChordError",
        "celery.backends.redis.RedisBackend.on_chord_part_return": "overridden, with the scripts and keys that it uses",
    },
    "workers/hooks/consumer.py": {
        "celery.worker.consumer.consumer.Consumer.on_unknown_task": "overridden: refuses",
        "celery.worker.consumer.consumer.Consumer.on_unknown_message": "overridden: refuses",
        "celery.worker.consumer.consumer.Consumer.on_invalid_task": "overridden: refuses",
        "celery.worker.consumer.consumer.Consumer.on_decode_error": "overridden: refuses, passes commands over",
        "celery.worker.consumer.consumer.Consumer.ensure_connected": "overridden: tries again every 2 s",
        "celery.worker.consumer.consumer.Consumer.on_connection_error_after_connected": "overridden: pauses",
        "celery.worker.consumer.consumer.Consumer.create_task_handler": "calls what is overridden above",
        "celery.worker.consumer.consumer.Consumer.add_task_queue": "overridden: the fleet is told",
        "celery.worker.consumer.consumer.Consumer.cancel_task_queue": "overridden: the fleet is told",
    },
    "workers/hooks/commands.py": {
        "celery.worker.control.Panel._register": "a command of a name takes the place of the one before",
        "celery.worker.control.add_consumer": "ours takes its place",
        "celery.worker.control.rate_limit": "ours takes its place, and calls it for other tasks",
        "celery.worker.control.time_limit": "ours takes its place",
        "celery.worker.control.cancel_consumer": "ours takes its place",
        "celery.app.amqp.Queues.consume_from": "which queues are consumed",
    },
    "workers/hooks/bootsteps.py": {
        "celery.bootsteps.StartStopStep.start": "overridden, as documented",
        "celery.worker.consumer.consumer.Consumer.register_with_event_loop": "calls our step with the loop",
        "celery.worker.loops.asynloop": "the loop: obeys should_stop at each turn, and drops a connection's timers",
        "kombu.asynchronous.hub.Hub.call_repeatedly": "tending and sweeping",
    },
    "workers/hooks/events.py": {
        "celery.events.dispatcher.EventDispatcher.__init__": "has _group_buffer, groups, clock, serializer and pid",
        "celery.events.dispatcher.EventDispatcher.send": "overridden: tries once; celery_events.py does it faster",
        "celery.events.dispatcher.EventDispatcher.flush": "publishes the buffer's lists, which stay the same lists",
        "celery.app.events.Events.Dispatcher": "makes the dispatcher that we name",
    },
    "workers/hooks/remote.py": {
        "celery.worker.control.Panel": "has data, a command for each name; ours take the place of some",
        "celery.worker.control.enable_events": "stepped over: for it no group means none, for the dispatcher all",
        "celery.worker.control.disable_events": "likewise",
        "celery.worker.consumer.events.Events._close": "keeps what was enabled for the next connection",
    },
    "workers/worker.py": {
        "celery.apps.worker.Worker.on_before_init": "overridden: what has no meaning here is refused or warned of",
        "celery.apps.worker.Worker.install_platform_tweaks": "overridden: our signal handlers over Celery's",
        "celery.platforms.Signals.__setitem__": "installs a handler",
        "celery.worker.worker.WorkController.setup_queues": "overridden: checks the names of the command line",
        "celery.apps.worker.Worker.start": "overridden: what follows the end",
        "celery.apps.worker.Worker.stop": "overridden: the fleet stops first",
        "celery.apps.worker.Worker.terminate": "overridden: the fleet stops first",
        "celery.apps.worker.Worker._send_worker_shutdown": "called where the broker cannot hear a goodbye",
        "celery.worker.state.maybe_shutdown": "obeys should_stop, which our handlers and fleet.py set",
        "celery.apps.worker.safe_say": "speaks from a signal handler",
        "celery.utils.log.in_sighandler": "keeps its logging from deadlocks",
    },
    "workers/celery.py": {
        "celery.app.base.Celery.Worker": "overridden: names our worker",
        "celery.app.base.Celery.subclass_with_self": "makes it",
        "celery.app.task.Task.run": "overridden, as documented",
    },
    "workers/fleet.py": {
        "celery.app.amqp.Queues.deselect": "leaves queues to workers whose engines can run",
        "celery.app.amqp.Queues.consume_from": "which queues are left",
    },
    "workers/observe/celery_events.py": {
        "celery.worker.consumer.events.Events.start": "makes a dispatcher for each connection, and sets eventer",
        "celery.worker.state.task_reserved": "takes our InFlight for a request",
        "celery.worker.state.task_accepted": "done here for all requests of a batch at once",
        "celery.worker.state.task_ready": "likewise",
        "celery.app.task.Task.push_request": "makes task.request that of the signal",
        "celery.app.task.Context": "the context that backends take",
    },
    "workers/requests/inflight.py": {
        "celery.worker.consumer.consumer.Consumer.on_close": "forgets what is not running; reads id",
        "celery.worker.control._state_of_task": "reads requests by their ids",
        "celery.worker.control.active": "calls info() of each",
    },
    "workers/path/expiry.py": {
        "celery.worker.control._revoke": "puts the ids of revoked tasks into state.revoked",
    },
    "workers/path/intake.py": {
        "kombu.asynchronous.hub.Hub.call_soon": "from any thread, wakes the loop; a promise in it already is one call",
        "vine.promises.promise.__call__": "may be called again and again",
    },
    "workers/broker/pipelined.py": {
        "kombu.asynchronous.hub.Hub.add": "add_reader: one callback a socket",
        "kombu.asynchronous.hub.Hub.remove_reader": "takes a socket out that is in readers",
        "redis.connection.Connection.read_response": "answers in the order of the questions",
        "redis.connection.Connection.send_packed_command": "sends without waiting for the answer before",
        "redis.connection.ConnectionPool.disconnect": "closes the connections that are not in use",
        "redis.commands.core.Script.__call__": "EVALSHA, and EVAL where the broker does not know it",
    },
    "workers/ends/canvas.py": {
        "celery.backends.redis.RedisBackend.mark_as_failure": "tells the chord and errbacks of a failure",
        "celery.backends.redis.RedisBackend._fail_chain": "ends the later steps of a chain, with the end's own state",
        "celery.backends.redis.RedisBackend.on_chord_part_return": "counts the members of a chord",
    },
    "shared/broker.py": {
        "redis.asyncio.connection.Connection._connect": "overridden: asks the sentinels first",
        "redis.connection.Connection._connect": "overridden: asks the sentinels first",
        "redis.connection.Connection.connect_check_health": "overridden: notes that nothing was sent",
        "redis.connection.Connection.read_response": "overridden: leaves a server that became a replica",
        "redis.connection.ConnectionPool.reset": "forgets the connections that are not in use",
        "redis.connection.ConnectionPool.connection_kwargs": "what the next connection is made with",
    },
    "shared/direct_asyncio.py": {
        "redis.asyncio.connection.Connection.connect_check_health": "afterwards there are a _reader and a _writer",
        "redis.asyncio.connection.Connection.send_packed_command": "imitated: writes to _writer, without a limit",
        "redis.asyncio.connection.Connection.read_response": "answers in the order of the questions",
        "redis.asyncio.connection.Connection.disconnect": "closes _writer",
        "redis.asyncio.connection.ConnectionPool.make_connection": "a connection that belongs to no pool",
    },
    "shared/keys.py": {
        "kombu.transport.redis.Channel._q_for_pri": "imitated: the list of a queue and priority",
        "kombu.transport.redis.Channel.priority": "imitated: the step of a priority",
        "celery.backends.redis.RedisBackend.get_key_for_task": "imitated: where a result is kept",
    },
    "shared/wire.py": {
        "celery.app.amqp.AMQP.as_task_v2": "imitated: the message of a task",
        "kombu.transport.redis.Channel._put": "imitated: the envelope on the list",
        "celery.backends.redis.RedisBackend._get_result_meta": "imitated: the record of a result",
        "celery.backends.redis.RedisBackend.prepare_exception": "imitated: the record of an error",
        "celery.backends.redis.RedisBackend._set": "imitated: how a record is written and published",
    },
}
"""By file: what it relies upon, by its dotted name, and for what."""

NAMES = sorted({name for uses in RELIED_UPON.values() for name in uses})

LIBRARIES = sorted({name.partition(".")[0] for name in NAMES})


@dataclass(frozen=True, slots=True)
class Recorded:
    """What was there when it was last checked: versions by library, fingerprints by dotted name."""

    versions: Mapping[str, str]
    fingerprints: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> Recorded:
        """What is kept in a file."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    @classmethod
    def now(cls) -> Recorded:
        """What is installed here. Raises :class:`LookupError` for a name that is not there."""
        return cls(
            {library: version(library) for library in LIBRARIES},
            {name: fingerprint(named(name)) for name in NAMES},
        )

    def write(self, path: Path) -> None:
        """Keep this in a file."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def named(name: str) -> Any:
    """What a dotted name stands for, a property as such; raise :class:`LookupError` where it is not there."""
    parts = name.split(".")
    for split in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        try:
            for part in parts[split:]:
                found = inspect.getattr_static(found, part)
        except AttributeError:
            break
        return found
    raise LookupError(f"there is no {name}")


def source(thing: Any) -> str:
    """The source of a class, function or property; of a plain value, what it is."""
    thing = getattr(thing, "__func__", thing)
    if isinstance(thing, property):
        thing = thing.fget
    elif isinstance(thing, cached_property):
        thing = thing.func
    try:
        return inspect.getsource(thing)
    except TypeError:
        return repr(thing)


def fingerprint(thing: Any) -> str:
    """The same for the same source."""
    return hashlib.sha256(source(thing).encode()).hexdigest()[:16]


def changed(name: str, recorded: Recorded) -> str | None:
    """One line that says how a name is not what it was; ``None`` where it is."""
    library = name.partition(".")[0]
    files = ", ".join(file for file, uses in RELIED_UPON.items() if name in uses)
    what = f"{name} of {library} {version(library)}"
    then = recorded.versions.get(library, "no version yet")
    try:
        found = fingerprint(named(name))
    except LookupError:
        return f"{what} is not there, and {files} needs it (checked against {then})"
    if found == recorded.fingerprints.get(name):
        return None
    return f"{what} is not what {files} was checked against ({then}): read it again, then record it: {COMMAND}"


def unchecked(recorded: Recorded) -> str | None:
    """One line about versions that are installed and were not checked; ``None`` where all were."""
    others = [library for library in LIBRARIES if version(library) != recorded.versions.get(library)]
    if not others:
        return None
    here = ", ".join(f"{library} {version(library)} (checked: {recorded.versions.get(library)})" for library in others)
    differ = [name for name in NAMES if name.partition(".")[0] in others and changed(name, recorded) is not None]
    return f"this worker was not checked with {here}; of what it relies upon, {', '.join(differ) or 'nothing'} differs"


def main(arguments: Sequence[str]) -> int:
    """Say what has changed, or record what is there."""
    if list(arguments) == ["--record"]:
        Recorded.now().write(KEPT)
        return 0
    if arguments:
        print(f"usage: {COMMAND.removesuffix(' --record')} [--record]", file=sys.stderr)
        return 2
    recorded = Recorded.read(KEPT)
    lines = [line for name in NAMES if (line := changed(name, recorded)) is not None]
    print("\n".join(lines or [f"nothing has changed: {', '.join(f'{n} {v}' for n, v in recorded.versions.items())}"]))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
