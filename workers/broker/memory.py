"""The delivery in memory, for tests of the rules: it fails when it is told to, and answers when it is told to."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from shared.limits import Limits, LimitsInForce
from shared.settings import FleetSettings, Settings
from workers.broker.delivery import Claim, Deadline, Quotas, Settlement, Swept, Verdict, Written, quotas_of
from workers.broker.memory_broker import MemoryBroker

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Failure:
    """How a command is to fail: with ``error``, and ``done`` if it has been carried out all the same."""

    error: Exception
    done: bool


@dataclass(slots=True, eq=False)
class _Sent:
    """A command whose answer is on its way, and what follows."""

    command: Callable[[], Any]
    then: Callable[[Any], None]
    lost: Callable[[], None]
    carried_out: bool = False
    answer: Any = None


class MemoryDelivery:
    """One worker's :class:`~workers.broker.delivery.Delivery` over a broker in memory. For one thread.

    While it is attached, what ends in ``soon`` is under way until :meth:`answer` or :meth:`wait`; otherwise each
    command is waited for, as with the real one.
    """

    def __init__(
        self, broker: MemoryBroker, fleet: FleetSettings, limits: LimitsInForce | None = None, affinity: str = ""
    ) -> None:
        self.broker = broker
        self.affinity = affinity
        self.lease_seconds = fleet.lease_seconds
        self.failures: deque[Failure] = deque()
        """The next command fails with the first of these."""
        self._lease_ms = int(fleet.lease_seconds * 1000)
        self._limits = limits or LimitsInForce(Limits.of(Settings(fleet=fleet)))
        self._quotas: Quotas = {}
        self._attached = False
        self._under_way: deque[_Sent] = deque()

    # -- the connection ---------------------------------------------------------------------------------------------

    @property
    def under_way(self) -> int:
        """How many commands have no answer yet."""
        return len(self._under_way)

    def attach(self) -> None:
        """A loop is there: answers come later from now on."""
        self._attached = True

    def detach(self) -> None:
        """The loop is over: take in what is under way, and wait for each command from now on."""
        try:
            while self.answer():
                pass
        finally:
            self.lose()
            self._attached = False

    def carry_out(self) -> None:
        """The broker carries out what it was sent; the answers are on their way."""
        for sent in self._under_way:
            if not sent.carried_out:
                sent.answer, sent.carried_out = sent.command(), True

    def answer(self) -> bool:
        """Take in the answer to what was sent first; ``False`` where nothing is under way."""
        if not self._under_way:
            return False
        self._fail_where_told()
        self.carry_out()
        sent = self._under_way.popleft()
        sent.then(sent.answer)
        return True

    def lose(self) -> None:
        """The connection is gone: what is under way has no answer. What was not carried out never will be."""
        while self._under_way:
            self._under_way.pop().lost()

    def _fail_where_told(self) -> None:
        if self.failures:
            failure = self.failures.popleft()
            if failure.done:
                self.carry_out()
            self.lose()
            raise failure.error

    def _run(self, command: Callable[[], T]) -> T:
        if not self.failures:
            return command()
        failure = self.failures.popleft()
        if failure.done:
            command()
        raise failure.error

    def _run_soon(self, command: Callable[[], T], then: Callable[[T], None], lost: Callable[[], None]) -> None:
        if self._attached:
            self._under_way.append(_Sent(command, then, lost))
            self._fail_where_told()
            return
        try:
            answer = self._run(command)
        except BaseException:
            lost()
            raise
        then(answer)

    # -- the commands -----------------------------------------------------------------------------------------------

    def claim(self, queue: str, limit: int) -> Claim:
        """Lease up to ``limit`` messages of ``queue``, the most urgent and oldest first."""
        return self._run(self._claim(queue, limit))

    def claim_soon(self, queue: str, limit: int, then: Callable[[Claim], None], lost: Callable[[], None]) -> None:
        """The same, while the loop goes on."""
        self._run_soon(self._claim(queue, limit), then, lost)

    def _claim(self, queue: str, limit: int) -> Callable[[], Claim]:
        patience, quotas = self._limits.now.starvation_limit, self._quotas
        return lambda: self.broker.claim(queue, limit, self._lease_ms, patience, quotas, self.affinity)

    def begin(self, messages: Sequence[tuple[str, str, str]]) -> list[Verdict]:
        """Whether messages, each a lease, an id and a content's digest, may run."""
        return self._run(lambda: self.broker.begin(messages)) if messages else []

    def settle(self, settlements: Sequence[Settlement]) -> list[Written]:
        """End leases, and write what follows; says what came of each."""
        return self._run(lambda: self.broker.settle(settlements)) if settlements else []

    def settle_soon(
        self, settlements: Sequence[Settlement], then: Callable[[list[Written]], None], lost: Callable[[], None]
    ) -> None:
        """The same, while the loop goes on."""
        self._run_soon(lambda: self.broker.settle(settlements), then, lost)

    def wait(self) -> None:
        """Take in what has become of all that was sent so far."""
        asked = set(self._under_way)
        while not asked.isdisjoint(self._under_way):
            self.answer()

    def cancelled_among(self, request_ids: Sequence[str]) -> set[str]:
        """Which of these requests were cancelled."""
        return self._run(lambda: self.broker.cancelled_among(request_ids)) if request_ids else set()

    def sweep(self) -> tuple[float | None, list[Swept]]:
        """Take over expired leases and put due delayed messages back."""
        return self._run(lambda: self.broker.sweep(self._lease_ms))

    def late(self) -> tuple[float, list[Swept]]:
        """Take over requests whose deadline has passed while they wait on a list."""
        return self._run(lambda: self.broker.late(self._lease_ms))

    def unread(self) -> tuple[bool, list[tuple[str, bytes]]]:
        """What others than our client have put on lists since the last time: each message with its list."""
        return self._run(lambda: (False, self.broker.unread()))

    def deadlines(self, deadlines: Sequence[Deadline]) -> list[float]:
        """Note until when requests are wanted. Returns what counts, in seconds."""
        return self._run(lambda: self.broker.note(deadlines)) if deadlines else []

    def secret(self) -> bytes:
        """What the fleet's workers seal with, and when it was made."""
        return self._run(lambda: self.broker.seal)

    def share_out(self, places: int) -> None:
        """Reckon what each tenant may have in flight of this many places in the fleet."""
        self._quotas = quotas_of(self._limits.now.tenants, places)


class MemoryLeases:
    """The leases of one worker. They are kept when :meth:`keep` is called, as the real ones are by their process."""

    def __init__(self, broker: MemoryBroker, fleet: FleetSettings) -> None:
        self._broker = broker
        self._lease_ms = int(fleet.lease_seconds * 1000)
        self._held: dict[str, float | None] = {}
        self._gone: set[str] = set()

    @property
    def held(self) -> Mapping[str, float | None]:
        """The leases that are held, and until when at the longest (seconds since the epoch)."""
        return self._held

    def hold(self, lease: str, deadline: float | None = None) -> None:
        """Keep ``lease`` until it is released, but not past ``deadline`` (seconds since the epoch)."""
        self._held[lease] = deadline

    def release(self, leases: Iterable[str]) -> None:
        """Stop keeping these leases."""
        for lease in leases:
            self._held.pop(lease, None)

    def keep(self) -> None:
        """Renew what is held."""
        self._gone |= self._broker.renew(self._held, self._lease_ms)

    def tend(self, settled: Callable[[], None] = lambda: None) -> set[str]:
        """The leases that others have; they are not held any longer. ``settled`` releases what has been settled."""
        settled()
        lost, self._gone = self._held.keys() & self._gone, set()
        self.release(lost)
        return lost
