"""From a claimed message to a request that waits: it is read, checked, and sent where it can be answered.

The whole way is in ``docs/life-of-a-request.md``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from shared import wire
from shared.errors import FleetError, UndecodableMessage
from shared.identity import content_of
from shared.limits import LimitsInForce
from workers.broker.delivery import Delivery, Verdict
from workers.broker.errors import BROKER_ERRORS
from workers.broker.leases import Leases
from workers.ends.outbox import Outbox
from workers.ends.settler import frames
from workers.models.manager import ModelManager
from workers.observe.observers import Observers
from workers.path.expiry import Expiry
from workers.path.waiting_room import WaitingRoom
from workers.requests.ending import Ending
from workers.requests.inflight import InFlight, State
from workers.requests.table import RequestTable
from workers.requests.timeouts import reckon
from workers.routing.fallback import Fallback

logger = logging.getLogger(__name__)

SAME_ID_SECONDS = 1.0
"""How long a message waits while another of the same id is under way."""

CLOCKS_APART_SECONDS = 60.0
"""How far the clocks of a sender and of the broker may be apart for a cancellation to be seen at once."""

Wait = Callable[[InFlight, float], None]
"""Lets an admitted request wait for its turn; the time is in seconds since the epoch."""


class Admission:
    """Owns the transitions of requests that were claimed and do not wait for their turn yet."""

    def __init__(
        self,
        table: RequestTable,
        delivery: Delivery,
        leases: Leases,
        outbox: Outbox,
        observers: Observers,
        models: ModelManager,
        waiting: WaitingRoom,
        expiry: Expiry,
        fallback: Fallback,
        limits: LimitsInForce,
        wait: Wait,
    ) -> None:
        self._table = table
        self._delivery = delivery
        self._leases = leases
        self._outbox = outbox
        self._observers = observers
        self._models = models
        self._waiting = waiting
        self._expiry = expiry
        self._fallback = fallback
        self._limits = limits
        self._wait = wait

    def admit(self, item: InFlight) -> None:
        """Take one claimed request over: from here on only its lease counts.

        Raises what a broker that fails raises: the request stays claimed, and is to be admitted again when it is back.
        """
        try:
            self._admit(item)
        except UndecodableMessage as error:
            self._outbox.add(Ending.refused(item, error))
        except FleetError as error:
            self._outbox.add(Ending.failed(item, error))
        except BROKER_ERRORS:
            raise
        except Exception as error:  # noqa: BLE001  # the boundary: no message may stop the loop that takes all the others
            logger.error("request %s could not be taken in: %s\n%s", item.id, type(error).__name__, frames(error))
            text = f"the request could not be taken in: {type(error).__name__}"
            self._outbox.add(Ending.failed(item, FleetError(text)))

    def _admit(self, item: InFlight) -> None:
        wire.check_body(item.body, self._limits.now.max_payload_bytes)
        read_before = item.embed is not None
        args, kwargs, item.embed = item.decode()
        later = item.due > item.claimed
        if not later and not read_before:
            self._observers.tell("request_received", item)
        item.request = item.validated(args, kwargs)
        if item.request.timeout is not None:
            reckon(item, self._delivery, item.claimed)
        request = item.request
        if not item.content:
            item.content = content_of(request)
        if (ending := self._expiry.unwanted(item, item.claimed)) is not None:
            self._outbox.add(ending)
            return
        if later:  # not before it is known that it was not cancelled
            self._table.move(item, State.ASKING)
            return
        if not self._models.serves(request.model, request.kind, request.features):
            decision = self._fallback.elsewhere(request, item.hops, item.sent)
            self._outbox.add(self._fallback.carried_out(decision, item, item.claimed))
            return
        if request.deadline is not None:  # it may run past its ``expires``
            self._leases.hold(item.lease, request.deadline)
        if item.foreign:
            self._table.move(item, State.ASKING)
        else:
            self._wait(item, item.claimed)

    def ask(self) -> None:
        """Other senders may use an id twice: such a message waits for the other one, and ends with its answer.

        What is to run later is asked for too: it may have been cancelled while it waited.
        """
        asking = self._table.all(State.ASKING)
        if not asking:
            return
        foreign = [item for item in asking if item.foreign]
        begun = self._delivery.begin([(item.lease, item.id, item.content) for item in foreign])
        verdicts = dict(zip(foreign, begun, strict=True))
        gone = self._delivery.cancelled_among([item.id for item in asking if not item.foreign])
        for item in asking:
            verdict = verdicts.get(item) or (Verdict.REVOKED if item.id in gone else Verdict.RUN)
            if verdict is Verdict.RUN and item.due > item.claimed:
                self._outbox.add(Ending.delayed(item, item.due))
            elif verdict is Verdict.RUN:
                self._wait(item, item.claimed)
            elif verdict is Verdict.WAIT:
                self._outbox.add(Ending.delayed(item, item.claimed + SAME_ID_SECONDS))
            elif verdict is Verdict.REVOKED:  # it has its record, but the rest of its canvas does not know
                self._outbox.add(Ending.cancelled(item))
            else:
                self._outbox.add(Ending.duplicate(item))

    def drop_cancelled(self, last: float) -> None:
        """End what waits and was cancelled, where the last cancellation was at this time, in seconds since the epoch.

        What was sent after it is not asked about. Where a sender's clock is so wrong that this overlooks one, it is
        found while it runs.
        """
        waiting = [item for item in self._waiting if item.sent <= last + CLOCKS_APART_SECONDS]
        if not waiting:
            return
        gone = self._delivery.cancelled_among([item.id for item in waiting])
        dropped = {item for item in waiting if item.id in gone}
        self._waiting.remove(dropped)
        for item in dropped:
            self._outbox.add(Ending.cancelled(item))
