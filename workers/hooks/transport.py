"""Kombu's Redis transport with leases in place of pop-then-register.

Messages lie where stock kombu puts them, so stock producers and consumers share the queues. What differs is how this
side takes them: it waits without popping, and claims as many as there is room for in one atomic step. A queue either
belongs to a :class:`MessageSink`, which says how much it has room for, or is consumed one task at a time within
Celery's prefetch limit.

Waiting: one extra connection asks whether the lists exist, with client tracking on. The broker answers at once and then
tells that connection, once, when one of them changes. Nothing is popped, no payload travels, and a worker that dies in
its sleep takes nothing with it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Protocol

from kombu.transport import redis as kombu_redis
from redis.exceptions import OutOfMemoryError, ReadOnlyError

from shared import keys, wire
from shared.contract import TASK_NAME
from shared.errors import BadRequest
from shared.limits import LimitsInForce
from shared.signing import Signer
from workers.broker.delivery import LEFT_OUT_SECONDS, Claim, LeasedMessage, Settlement
from workers.ends.settler import Settler
from workers.requests.ending import Ending
from workers.requests.inflight import InFlight

logger = logging.getLogger(__name__)

PREFETCH_UNLIMITED = 64

STALE_SHARE = 1 / 3
"""Share of a lease after which a claim's answer is too old, because the broker or this process stood still."""


class MessageSink(Protocol):
    """Takes the messages of a queue in batches."""

    def room(self) -> int:
        """How many messages it could start soon; asked before every claim."""

    def receive(self, lease: str, envelope: dict[str, Any]) -> None:
        """Take one claimed request over: from here on only its lease counts, whatever becomes of the connection."""

    def claim_delivered(self, claim: Claim) -> None:
        """Called after every message of a claim was delivered."""


class _Waiter:
    """Holds the waiting connection where kombu's poller looks for a client's connection."""

    connection: Any = None


class TransportParts(dict[str, Any]):
    """What the transport needs of the worker: handed over among the transport options.

    Remote control shows these options as JSON; there this is an empty object.
    """

    def __init__(
        self, settler: Settler, sinks: Mapping[str, MessageSink], signer: Signer, limits: LimitsInForce
    ) -> None:
        super().__init__()
        self.delivery = settler.delivery
        self.leases = settler.leases
        self.settler = settler
        self.sinks = sinks
        self.signer = signer
        self.limits = limits


class LeaseQoS(kombu_redis.virtual.QoS):
    """Keeps track of messages handed to ordinary Celery tasks; the broker's side of it is their lease."""

    channel: Channel

    def append(self, message: Any, delivery_tag: str) -> None:
        """Note a delivered message; its lease exists already."""
        super().append(message, delivery_tag)
        self.channel.leases.hold(delivery_tag)

    def forget(self, delivery_tag: str) -> None:
        """Forget a message whose lease is settled elsewhere."""
        self._quick_ack(delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        """End a lease: the task is done with."""
        self._end(Settlement(delivery_tag))

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """End a lease and put the message back, or among the dead letters."""
        if requeue:
            self._end(Settlement.give_back(delivery_tag))
        else:
            self._end(Settlement(delivery_tag, dead_reason="rejected: no task of this name, or refused by it"))

    def _end(self, outcome: Settlement) -> None:
        try:
            self.channel.delivery.settle([outcome])
        finally:  # where the broker did not take it, the lease lapses: what is not acknowledged runs again
            self.channel.leases.release([outcome.lease])
            self._quick_ack(outcome.lease)

    def restore_unacked_once(self, stderr: Any = None) -> None:
        """Give everything back that is still open, when the channel closes."""
        self._on_collect.cancel()
        self._flush()
        open_leases = list(self._delivered)
        self._delivered.clear()
        if not open_leases:
            return
        self.channel.leases.release(open_leases)
        try:
            self.channel.delivery.settle([Settlement.give_back(lease) for lease in open_leases])
        except self.channel.connection_errors as error:
            logger.warning("%d messages stay leased until their leases expire: %s", len(open_leases), error)

    def restore_visible(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: expired leases are swept by :mod:`workers.routing.sweeper`."""


class Channel(kombu_redis.Channel):
    """A channel that claims."""

    QoS = LeaseQoS
    services: TransportParts

    from_transport_options = (*kombu_redis.Channel.from_transport_options, "services")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.waiter = _Waiter()
        self.unanswered = 0
        self._armed_for: set[str] = set()
        self._backlog: dict[str, int] = {}
        self._look_at: dict[str, float] = {}
        self._unacknowledged: set[str] = set()
        self._claiming: set[str] = set()
        super().__init__(*args, **kwargs)
        self.delivery = self.services.delivery
        self.leases = self.services.leases
        self.intakes = self.services.sinks

    # -- waiting ----------------------------------------------------------------------------------------------------

    def wake_connection(self) -> Any:
        """The connection that waits; connected and tracking."""
        if self.waiter.connection is None:
            pool = self.async_pool
            # Its health is checked by the question that it is asked: a PING would meet the answer to another.
            options = {**pool.connection_kwargs, "protocol": 3, "health_check_interval": 0}
            self.waiter.connection = pool.connection_class(**options)
        connection = self.waiter.connection
        if connection._sock is None:
            connection.connect()
            connection.send_command("CLIENT", "TRACKING", "ON")
            connection.read_response()
            self.unanswered = 0
            self._armed_for.clear()
        return connection

    def arm(self, again: bool = False) -> None:
        """Ask of the queues that are not known to hold anything whether they do, and to be told when they do.

        The answer comes to the poller. ``again`` repeats the question where it was asked before.
        """
        connection = self.wake_connection()
        if again:
            self._armed_for.clear()
        empty = (
            {queue for queue in self.active_queues if not self._backlog.get(queue)} - self._claiming - self._armed_for
        )
        if empty:
            self._armed_for |= empty
            self.unanswered += 1
            names = (name for queue in sorted(empty) for name in (*keys.lists_of(queue), *keys.lanes_of(queue)))
            connection.send_command("EXISTS", *names)

    def _brpop_read(self, **options: Any) -> bool:
        """Something came on the waiting connection: the answer to the question, or the news of a change."""
        connection = self.waiter.connection
        found = False
        try:
            while True:
                answer = connection.read_response(push_request=True)
                if isinstance(answer, int):
                    self.unanswered -= 1
                    found = found or answer > 0
                else:
                    found = True
                if not connection.can_read(timeout=0):
                    break
        except self.connection_errors:
            connection.disconnect()
            raise
        if found:
            self._armed_for.clear()
            self.claim_all()
        return found

    # -- claiming ---------------------------------------------------------------------------------------------------

    def room(self, queue: str) -> int:
        """How many messages of ``queue`` may be claimed now."""
        intake = self.intakes.get(queue)
        if intake is not None:
            return intake.room()
        limit: int = self.qos.prefetch_count
        if not limit:
            return PREFETCH_UNLIMITED
        return max(0, limit - (len(self.qos._delivered) - len(self.qos._dirty)))

    def claim_all(self) -> None:
        """Claim from every queue that has room.

        The requests of an engine's queue are delivered when the answer comes; the loop goes on meanwhile.
        """
        for queue in self.active_queues:
            if queue in self._claiming:
                continue
            room = self.room(queue)
            if room <= 0:
                # It was not asked, so it may hold something.
                self._backlog[queue] = max(1, self._backlog.get(queue, 0))
                continue
            then = partial(self._claimed, queue, time.monotonic())
            if queue in self.intakes:
                self._claiming.add(queue)
                self.delivery.claim_soon(queue, room, then, partial(self._claiming.discard, queue))
            else:
                then(self.delivery.claim(queue, room))

    def _claimed(self, queue: str, asked: float, claim: Claim) -> None:
        """Deliver what a claim brought."""
        self._claiming.discard(queue)
        self._backlog[queue] = claim.waiting
        consumed = queue in self.active_queues and not self.closed
        if not consumed or time.monotonic() - asked > STALE_SHARE * self.delivery.lease_seconds:
            # Nobody has kept these leases yet, so some may have been taken over: what is ours goes back.
            self.delivery.settle([Settlement.give_back(message.lease) for message in reversed(claim.messages)])
            self._backlog[queue] = 1
            return
        if claim.left_out and not claim.waiting:
            self._look_at[queue] = time.monotonic() + LEFT_OUT_SECONDS
        else:
            self._look_at.pop(queue, None)
        if queue in self._unacknowledged:
            self.delivery.settle([Settlement(message.lease) for message in claim.messages])
        intake = self.intakes.get(queue)
        for message in claim.messages:
            self._hand_over(queue, message, intake)
        if intake is not None:
            intake.claim_delivered(claim)

    def _queue_bind(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._queue_bind(*args, **kwargs)
        except OutOfMemoryError as error:
            # To take requests no binding is needed, and what waits must be worked on to make room. A sender binds the
            # queue that it sends to, and the bindings of remote control are refreshed.
            logger.warning("a queue is not bound yet: %s", error)

    def basic_consume(self, queue: str, no_ack: bool, *args: Any, **kwargs: Any) -> Any:
        """Consume; what a consumer does not acknowledge (replies of remote control) is done with when it is taken."""
        if no_ack:
            self._unacknowledged.add(queue)
        return super().basic_consume(queue, no_ack, *args, **kwargs)

    def basic_get(self, queue: str, no_ack: bool = False, **kwargs: Any) -> Any:
        """One message, or ``None``."""
        message = super().basic_get(queue, no_ack=no_ack, **kwargs)
        if message is not None and no_ack:
            self.delivery.settle([Settlement(message.delivery_tag)])
        return message

    @property
    def backlog(self) -> bool:
        """Whether a queue with room is known to hold messages."""
        now = time.monotonic() if self._look_at else 0.0
        due = (queue for queue, when in self._look_at.items() if now >= when)
        held = (queue for queue, waiting in self._backlog.items() if waiting)
        return any(queue not in self._claiming and self.room(queue) > 0 for queue in (*due, *held))

    def _hand_over(self, queue: str, message: LeasedMessage, intake: MessageSink | None) -> None:
        """Requests go straight to their intake, everything else to Celery's consumer."""
        envelope = self._read(queue, message)
        if envelope is None:
            return
        if intake is not None and envelope["headers"].get("task") == TASK_NAME:
            intake.receive(message.lease, envelope)
            return
        envelope["properties"]["delivery_info"] = {"exchange": "", "routing_key": queue}
        self.connection._deliver(envelope, queue)

    def _read(self, queue: str, message: LeasedMessage) -> dict[str, Any] | None:
        """The envelope of a claimed message; ``None`` where it is refused, which is settled here."""
        try:
            envelope = wire.decode_envelope(message.payload, self.services.limits.now.max_payload_bytes)
            if queue not in self._unacknowledged:  # there are no tasks among the replies of remote control
                self.services.signer.check(envelope)
        except BadRequest as error:
            item = InFlight.unreadable(message.lease, queue, message.payload, error)
            logger.error("a message on %s went to the dead letters: %s", queue, error)
            self.services.settler.end([Ending.refused(item, error)])
            return None
        envelope["properties"]["delivery_tag"] = message.lease
        return envelope

    def _get(self, queue: str) -> dict[str, Any]:
        claim = self.delivery.claim(queue, 1)
        envelope = self._read(queue, claim.messages[0]) if claim.messages else None
        if envelope is None:
            raise kombu_redis.Empty()
        return envelope

    # -- publishing and remote control ------------------------------------------------------------------------------

    def prepare_message(
        self,
        body: str | bytes,
        priority: int | None = None,
        content_type: str | None = None,
        content_encoding: str | None = None,
        headers: dict[str, Any] | None = None,
        properties: dict[str, Any] | None = None,
    ) -> Any:
        """Sign the tasks that this process publishes: the next steps of canvases, the schedule."""
        if headers and "task" in headers and self.services.signer:
            text = body if isinstance(body, str) else body.decode()
            headers = {**headers, wire.HEADER: self.services.signer.sign(headers, text)}
        return super().prepare_message(body, priority, content_type, content_encoding, headers, properties)

    def message_to_python(self, raw_message: Any) -> Any:
        """Commands and events, which are on no list, are not decompressed either."""
        if not isinstance(raw_message, self.Message) and raw_message.get("headers"):
            raw_message["headers"].pop("compression", None)
        return super().message_to_python(raw_message)

    def close(self) -> None:
        """Close the waiting connection, then everything else."""
        if self.waiter.connection is not None:
            self.waiter.connection.disconnect()
        super().close()


class Poller(kombu_redis.MultiChannelPoller):
    """Polls the waiting connection of each channel in place of a blocking pop."""

    def _register_BRPOP(self, channel: Channel) -> None:  # noqa: N802  # kombu's name
        connection = channel.wake_connection()
        ident = (channel, channel.waiter, "BRPOP")
        if self._chan_to_sock.get(ident) is not connection._sock:
            self._fd_to_chan[connection._sock.fileno()] = (channel, "BRPOP")
            self._chan_to_sock[ident] = connection._sock
            self.poller.register(connection._sock, self.eventflags)
        channel.arm()

    def _update_brpop_polling(self) -> None:
        """Nothing is ever popped, so nothing has to be held back while there is no room."""

    def on_poll_start(self) -> None:
        """Before the loop sleeps: claim what is known to be there, then ask to be woken."""
        for channel in self._channels:
            if channel.active_queues:
                if channel.backlog:
                    channel.claim_all()
                self._register_BRPOP(channel)
            if channel.active_fanout_queues:
                self._register_LISTEN(channel)

    def on_readable(self, fileno: int) -> None:
        """One of our sockets has something to say."""
        entry = self._fd_to_chan.get(fileno)
        if entry is not None:
            channel, kind = entry
            channel.handlers[kind]()

    def maybe_refresh_binding_expiry(self) -> None:
        """Keep the bindings of remote control; a server that has become a replica is left for the one that is not."""
        for channel in self._channels:
            try:
                channel.maybe_refresh_binding_expiry()
            except ReadOnlyError as error:
                raise ConnectionError("the broker has become a read-only replica") from error
            except (channel.ResponseError, *channel.connection_errors) as error:
                logger.debug("cannot refresh the bindings, trying again: %s", error)

    def maybe_check_brpop_health(self) -> None:
        """Ask again; a broker that has not answered the last question by now is not there."""
        for channel in self._channels:
            if channel.unanswered:
                logger.warning("the broker does not answer; reconnecting")
                channel.waiter.connection.disconnect()
                raise ConnectionError("the broker does not answer")
            if channel.active_queues:
                channel.arm(again=True)


class Transport(kombu_redis.Transport):
    """Kombu's Redis transport with claims and leases."""

    Channel = Channel
    _ticks: ClassVar[set[Any]] = set()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cycle = Poller()

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """Kombu leaves its callback in the loop when a connection is gone, and with it all that the connection was."""
        loop.on_tick -= self._ticks
        before = set(loop.on_tick)
        super().register_with_event_loop(connection, loop)
        Transport._ticks = loop.on_tick - before
