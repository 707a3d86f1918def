"""Kombu's Redis transport with leases in place of pop-then-register.

Messages lie where stock kombu puts them, so stock producers and consumers share the queues. What differs is how this
side takes them: it waits without popping, and claims as many as there is room for in one atomic step. A queue either
belongs to a :class:`MessageSink`, which says how much it has room for, or is consumed one task at a time within
Celery's prefetch limit.

How it waits is in :mod:`workers.broker.waiting`.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, ClassVar, Protocol

from kombu.transport import redis as kombu_redis
from redis.exceptions import OutOfMemoryError, ReadOnlyError

from shared import keys, wire
from shared.broker import lua, pool_of
from shared.contract import TASK_NAME
from shared.errors import BadRequest
from shared.limits import LimitsInForce
from shared.masking import masked_url
from shared.queues import waiting
from shared.signing import Signer
from shared.tls import BrokerTerms
from workers.broker.delivery import Claim, LeasedMessage, RedisDelivery, Settlement
from workers.broker.pipelined import PATIENCE_SECONDS, PipelinedScripts
from workers.broker.waiting import Waiting
from workers.ends.settler import Settler
from workers.requests.ending import Ending
from workers.requests.inflight import InFlight

logger = logging.getLogger(__name__)

PREFETCH_UNLIMITED = 64

EVENT_TIMEOUT_SECONDS = 2.0
"""Longest wait of the worker's loop for what Celery sends: events and replies of remote control. Not for requests."""

HEALTH_CHECK_SECONDS = 5
"""A connection of Celery's that was idle for longer is tried before it is used."""

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


class TransportParts(dict[str, Any]):
    """What the transport needs of the worker: handed over among the transport options.

    Remote control shows these options as JSON; there this is an empty object.
    """

    def __init__(
        self,
        broker: BrokerTerms,
        delivery: RedisDelivery,
        settler: Settler,
        sinks: Mapping[str, MessageSink],
        signer: Signer,
        limits: LimitsInForce,
    ) -> None:
        super().__init__()
        self.broker = broker
        self.delivery = delivery
        self.leases = settler.leases
        self.settler = settler
        self.sinks = sinks
        self.signer = signer
        self.limits = limits

    def __repr__(self) -> str:
        """Different for each fleet: kombu shares connections whose options look alike."""
        return object.__repr__(self)


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
            self.channel.delivery.settle([Settlement.give_back(lease) for lease in reversed(open_leases)])
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
        self.waiting = Waiting()
        self.heard: dict[str, int] = {}
        self._taken = 0
        self._unacknowledged: set[str] = set()
        super().__init__(*args, **kwargs)
        self.delivery = self.services.delivery
        self._own_scripts = self.delivery.pipeline()
        self.leases = self.services.leases
        self.intakes = self.services.sinks

    def _get_pool(self, asynchronous: bool = False) -> Any:
        """Connections to the fleet's broker, like everybody's here, but in less of a hurry to be believed."""
        terms = self.services.broker
        pool = pool_of(terms, socket_timeout=min(terms.socket_timeout_seconds, EVENT_TIMEOUT_SECONDS))
        pool.connection_kwargs["health_check_interval"] = HEALTH_CHECK_SECONDS
        self.keyprefix_fanout = kombu_redis.Channel.keyprefix_fanout.format(db=pool.connection_kwargs["db"])
        if asynchronous:
            pool.connection_class = _watched(pool.connection_class, self)
        return pool

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

    @property
    def scripts(self) -> PipelinedScripts:
        """The connection that claims: the loop's, or without one the channel's own, for each may have its thread."""
        shared = self.delivery.scripts
        return shared if shared.attached else self._own_scripts

    def claim_all(self) -> bool:
        """Claim from every queue that may hold something and has room; whether messages have been delivered.

        In a loop they are when the answer comes; the loop goes on meanwhile.
        """
        before = self._taken
        for queue in self.waiting.due(self.active_queues):
            room = self.room(queue)
            if room > 0:
                self._claim(queue, room)
        return self._taken > before

    def _claim(self, queue: str, room: int) -> None:
        scripts = self.scripts
        scripts.tell(self)
        self.waiting.asked(queue)
        self.delivery.claim_soon(queue, room, partial(self._claimed, queue), partial(self.waiting.lost, queue), scripts)

    def changed(self, names: Collection[bytes] | None) -> None:
        """Something has changed in the broker."""
        if self.waiting.changed(names) and names is not None:
            self.claim_all()

    def freed(self) -> None:
        """Tenants may have less in flight than their share: what they lacked for may start here."""
        if self.waiting.freed():
            self.claim_all()

    def _brpop_read(self, **options: Any) -> bool:
        """Without a loop: something came on the connection that claims."""
        before = self._taken
        self._own_scripts.readable()
        return self._taken > before

    def _claimed(self, queue: str, claim: Claim) -> None:
        """Deliver what a claim brought."""
        took = self.waiting.answered(queue, claim)
        consumed = queue in self.active_queues and not self.closed
        if not consumed or took > STALE_SHARE * self.delivery.lease_seconds:
            # Nobody has kept these leases yet, so some may have been taken over: what is ours goes back.
            self.delivery.settle([Settlement.give_back(message.lease) for message in reversed(claim.messages)])
            self.waiting.doubt(queue)
            return
        self._taken += len(claim.messages)
        if queue in self._unacknowledged:
            self.delivery.settle([Settlement(message.lease) for message in claim.messages])
        intake = self.intakes.get(queue)
        left, refusals = deque(claim.messages), list[Ending]()
        try:
            while left:
                self._hand_over(queue, left.popleft(), intake, refusals)
        finally:
            if left:  # a task of Celery's has failed to be taken in: nobody keeps the leases of what came behind it
                self.delivery.settle([Settlement.give_back(message.lease) for message in reversed(left)])
        if intake is not None:
            intake.claim_delivered(claim)
        self.services.settler.end(refusals)

    def _queue_bind(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._queue_bind(*args, **kwargs)
        except OutOfMemoryError as error:
            # To take requests no binding is needed, and what waits must be worked on to make room. A sender binds the
            # queue that it sends to, and the bindings of remote control are refreshed.
            logger.warning("a queue is not bound yet: %s", error)

    # -- what Celery's commands ask of a queue ----------------------------------------------------------------------

    def _size(self, queue: str) -> int:
        """How many messages wait, those in tenants' lanes among them."""
        with self.conn_or_acquire() as client:
            return waiting(client, [queue])[queue]

    def _purge(self, queue: str) -> int:
        """Empty a queue, its tenants' lanes too."""
        with self.conn_or_acquire() as client:
            return int(client.register_script(lua("workers.broker", "purge"))(keys=keys.lists_of(queue)))

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

    def _hand_over(
        self, queue: str, message: LeasedMessage, intake: MessageSink | None, refusals: list[Ending]
    ) -> None:
        """Requests go to their intake, everything else to Celery's consumer, and what is refused to the list."""
        envelope = self._read(queue, message, refusals)
        if envelope is None:
            return
        if intake is not None and envelope["headers"].get("task") == TASK_NAME:
            intake.receive(message.lease, envelope)
            return
        envelope["properties"]["delivery_info"] = {"exchange": "", "routing_key": queue}
        self.connection._deliver(envelope, queue)

    def _read(self, queue: str, message: LeasedMessage, refusals: list[Ending]) -> dict[str, Any] | None:
        """The envelope of a claimed message; ``None`` where it is refused, whose end is added to the list."""
        try:
            envelope = wire.decode_envelope(message.payload, self.services.limits.now.max_payload_bytes)
            if queue not in self._unacknowledged:  # there are no tasks among the replies of remote control
                self.services.signer.check(envelope)
            self.services.settler.seal.check(envelope)
        except BadRequest as error:
            item = InFlight.unreadable(message.lease, queue, message.payload, error)
            logger.error("a message on %s went to the dead letters: %s", queue, error)
            refusals.append(Ending.refused(item, error))
            return None
        envelope["properties"]["delivery_tag"] = message.lease
        return envelope

    def _get(self, queue: str) -> dict[str, Any]:
        claim, refusals = self.delivery.claim(queue, 1), list[Ending]()
        envelope = self._read(queue, claim.messages[0], refusals) if claim.messages else None
        self.services.settler.end(refusals)
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

    def _put_fanout(self, exchange: str, message: dict[str, Any], routing_key: str, **kwargs: Any) -> None:
        """Publish an event or a command; ``heard`` keeps how many subscribers it had."""
        if kwargs.get("_publish_batch") is not None:
            super()._put_fanout(exchange, message, routing_key, **kwargs)
            return
        payload = wire.dumps(message)
        with self.conn_or_acquire() as client:
            topics = self._get_publish_topics(exchange, routing_key)
            self.heard[exchange] = sum(client.publish(topic, payload) for topic in topics)

    def message_to_python(self, raw_message: Any) -> Any:
        """Commands and events, which are on no list, are not decompressed either."""
        if not isinstance(raw_message, self.Message) and raw_message.get("headers"):
            raw_message["headers"].pop("compression", None)
        return super().message_to_python(raw_message)

    def close(self) -> None:
        """Close the channel's own connection, then everything else."""
        self._own_scripts.close()
        super().close()


def _watched(connection_class: Any, channel: Channel) -> type:
    """Connections that tell the poller when they are closed, as kombu's do."""

    class Watched(connection_class):
        def disconnect(self, *args: Any, **kwargs: Any) -> None:
            super().disconnect(*args, **kwargs)
            if channel._registered:
                channel._on_connection_disconnect(self)

    return Watched


class Poller(kombu_redis.MultiChannelPoller):
    """Lets the channels claim, and watches the connections that are not watched by the worker's loop itself."""

    def __init__(self) -> None:
        super().__init__()
        self._in_loop: set[Any] = set()
        self._wakes_at = 0.0

    def get(self, callback: Any, timeout: float | None = None) -> None:
        """Without a loop: deliver something, or wait for it."""
        if not any(channel.claim_all() for channel in self._channels if channel.active_queues):
            super().get(callback, timeout)

    def _register_BRPOP(self, channel: Channel) -> None:  # noqa: N802  # kombu's name
        sock, ident = channel.scripts.socket, (channel, channel.client, "BRPOP")
        if channel.delivery.scripts.attached or sock is None or self._chan_to_sock.get(ident) is sock:
            return
        mine = (channel, "BRPOP")
        for fileno in [fileno for fileno, entry in self._fd_to_chan.items() if entry == mine]:
            del self._fd_to_chan[fileno]
        self._fd_to_chan[sock.fileno()], self._chan_to_sock[ident] = mine, sock
        self.poller.register(sock, self.eventflags)

    def _update_brpop_polling(self) -> None:
        """Nothing is ever popped, so nothing has to be held back while there is no room."""

    def on_poll_start(self) -> None:
        """Before the loop sleeps: claim what may be there."""
        for channel in self._channels:
            if channel.active_queues:
                channel.claim_all()
                self._register_BRPOP(channel)
            if channel.active_fanout_queues:
                self._register_LISTEN(channel)

    def turn(self, loop: Any, on_readable: Any) -> None:
        """The same in a loop, which gets to know new connections."""
        self.on_poll_start()
        known, self._in_loop = self._in_loop, set(self._chan_to_sock.values())
        for sock in self._in_loop - known:
            loop.add_reader(sock, on_readable, sock.fileno())
        self._wake(loop)

    def _wake(self, loop: Any) -> None:
        """Have the loop wake when a queue is to be looked at without news: it claims when it wakes."""
        looks = [at for channel in self._channels if (at := channel.waiting.wake_at()) is not None]
        if not looks:
            return
        now, at = time.monotonic(), min(looks)
        if at < self._wakes_at or self._wakes_at < now:
            self._wakes_at = at
            loop.call_later(max(0.0, at - now) + 0.001, lambda: None)

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
        """Look again, whatever is known; a broker that owes an answer by now is not there."""
        for channel in self._channels:
            if channel.waiting.silent():
                # The answer may be there, or on its way: then it was this process or this machine that stood still.
                channel.scripts.poll(PATIENCE_SECONDS)
            if channel.waiting.silent():
                logger.warning("the broker does not answer; reconnecting")
                channel.scripts.close()
                raise ConnectionError("the broker does not answer")
            channel.waiting.changed(None)


class Transport(kombu_redis.Transport):
    """Kombu's Redis transport with claims and leases.

    Where the broker is, the transport options say: what Celery is told of it is not looked at. So it may be anywhere
    that the fleet's other connections lead to.
    """

    Channel = Channel
    can_parse_url = True
    _ticks: ClassVar[set[Any]] = set()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cycle = Poller()

    def as_uri(self, uri: str, include_password: bool = False, mask: str = "**") -> str:
        """The broker's URL as it is shown: never with the password, which none of those who ask for it needs."""
        parts = self.client.transport_options.get("services")  # none where Celery looks at the URL by itself
        return masked_url(uri if parts is None else parts.broker.redis_url)

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """Kombu leaves its callback in the loop when a connection is gone, and with it all that the connection was.

        At each turn of the loop it also gives it every socket again.
        """
        loop.on_tick -= self._ticks
        before = set(loop.on_tick)
        super().register_with_event_loop(connection, loop)
        loop.on_tick &= before
        tick = partial(self.cycle.turn, loop, self.on_readable)
        loop.on_tick.add(tick)
        Transport._ticks = {tick}
