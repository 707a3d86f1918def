"""The waiting messages of a broker in memory, and whose turn it is: what ``claim.lua`` and ``lists.lua`` decide."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from shared import keys
from workers.broker.delivery import COURTESY_SECONDS, Quotas

ANYBODY = (1, 0)
"""The quota of a tenant for whom there is no rule."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What was taken for one claim: the list and the tenant of each message (empty: the shared list), and the message.

    ``waiting`` is 0 where nothing is left that may be taken, ``left_out`` how often a tenant had its share already.
    """

    messages: list[tuple[str, str, bytes]]
    waiting: int
    left_out: int


@dataclass(slots=True)
class _Step:
    """One priority of a queue, while a claim looks at it."""

    name: str
    open: bool
    passed: int = 0


@dataclass(slots=True)
class _Basket:
    """What a claim has found so far."""

    limit: int
    quotas: Quotas
    affinity: str
    messages: list[tuple[str, str, bytes]] = field(default_factory=list)
    left_out: int = 0

    def quota(self, tenant: str) -> tuple[float, int]:
        return self.quotas.get(tenant) or self.quotas.get("*") or ANYBODY


class MemoryQueues:
    """Lists by name, as :func:`shared.keys.list_of` makes them. ``in_flight`` counts the leases of each tenant."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._affine: defaultdict[tuple[str, str], dict[str, float]] = defaultdict(dict)  # of a tenant -> since when
        self._lists: defaultdict[str, deque[bytes]] = defaultdict(deque)  # the oldest on the right
        self._lanes: defaultdict[str, dict[str, float]] = defaultdict(dict)  # shared list -> tenant -> its turn
        self._turns: defaultdict[str, float] = defaultdict(float)  # shared list -> the turn that was served last
        self._passed: defaultdict[str, int] = defaultdict(int)  # shared list -> more urgent ones claimed since its turn
        self._released: dict[str, bytes] = {}  # list -> the delayed message that came back to it last
        self.in_flight: Counter[str] = Counter()

    def release(self, name: str, messages: Sequence[bytes]) -> None:
        """Put delayed messages, the oldest first, in front of what waits, but behind those that came back before."""
        waiting, last = self._lists[name], self._released.get(name)
        ahead = list[bytes]()
        if last is not None and last in waiting:
            while not ahead or ahead[-1] != last:
                ahead.append(waiting.pop())
        for message in reversed(messages):
            self.push(name, message, front=True)
        waiting.extend(reversed(ahead))
        self._released[name] = messages[-1]

    def push(self, name: str, message: bytes, *, front: bool) -> None:
        """Put a message on a list: in front of everything that waits, or behind it."""
        waiting = self._lists[name]
        if front:
            waiting.append(message)
        else:
            waiting.appendleft(message)
        shared = _shared(name)
        if name != shared:
            tenant, affinity = _owner(name)
            self._lanes[shared].setdefault(tenant, self._turns[shared] + 1)
            if affinity:
                self._affine[shared, tenant].setdefault(affinity, self._clock())

    def remove(self, name: str, message: bytes) -> str:
        """Take a message from anywhere on its list; returns the tenant whose lane that is."""
        waiting, shared = self._lists[name], _shared(name)
        waiting.reverse()
        waiting.remove(message)
        waiting.reverse()
        tenant, affinity = _owner(name)
        if name != shared and not affinity and not waiting and not self._affine[shared, tenant]:
            self._lanes[shared].pop(tenant, None)
        if name != shared:
            self.in_flight[tenant] += 1
        return tenant if name != shared else ""

    def waiting(self) -> dict[str, list[bytes]]:
        """What is on each list that holds anything, the first to be claimed first."""
        return {name: list(reversed(messages)) for name, messages in self._lists.items() if messages}

    def take(self, queue: str, limit: int, patience: int, quotas: Quotas, affinity: str = "") -> Taken:
        """Take up to ``limit`` messages of a queue, the most urgent first; ``patience`` bounds how many pass one.

        What is meant for the worker with this ``affinity`` goes first among its tenant's.
        """
        names = keys.lists_of(queue)
        steps = [_Step(name, bool(self._lists[name] or self._lanes[name])) for name in names]
        basket = _Basket(limit, quotas, affinity)
        busy = [step for step in steps if step.open]
        if len(busy) == 1:
            self._take(busy[0].name, limit, basket)
        elif busy:
            self._take_in_turns(steps, patience, basket)
        full = len(basket.messages) == limit
        left = sum(len(self._lists[step.name]) + len(self._lanes[step.name]) for step in steps if step.open)
        return Taken(basket.messages, left if full else 0, basket.left_out)

    def _take_in_turns(self, steps: list[_Step], patience: int, basket: _Basket) -> None:
        for step in steps[1:]:
            step.passed = self._passed[step.name]
        while (left := basket.limit - len(basket.messages)) > 0:
            opened = [place for place, step in enumerate(steps) if step.open]
            if not opened:
                break
            tired = [place for place in opened if place > 0 and steps[place].passed >= patience]
            turn = tired[-1] if tired else opened[0]
            behind = [step for step in steps[turn + 1 :] if step.open]
            count = 1 if tired else min([left, *(patience - step.passed for step in behind)])
            got = self._take(steps[turn].name, count, basket)
            if got < count:
                steps[turn].open = False
            steps[turn].passed = 0
            if not tired:
                for step in behind:
                    step.passed += got
        for step in steps[1:]:
            self._passed[step.name] = step.passed if step.open else 0

    def _take(self, shared: str, count: int, basket: _Basket) -> int:
        """Take up to ``count`` messages of one step; its tenants' lanes and the shared list take turns."""
        lanes, before = self._lanes[shared], len(basket.messages)
        if set(lanes) == {""} and not self._affine[shared, ""]:
            del lanes[""]
        if not lanes:
            basket.messages += [(shared, "", message) for message in self._pop(shared, count)]
            return len(basket.messages) - before
        turn = self._turns[shared]
        if self._lists[shared]:
            lanes.setdefault("", turn + 1)
        skipped = 0
        while len(basket.messages) - before < count:
            order = sorted(lanes.items(), key=lambda entry: (entry[1], entry[0]))
            if skipped == len(order):
                break
            tenant, score = order[skipped]
            weight, most = basket.quota(tenant)
            name = self._next_lane(shared, tenant, basket.affinity)
            if name is None or (tenant and most and self.in_flight[tenant] >= most):
                skipped += 1
                continue
            for message in self._pop(name, 1):
                basket.messages.append((name, tenant, message))
                if tenant:
                    self.in_flight[tenant] += 1
            lanes[tenant] += 1 / weight
            self._served(shared, tenant, name)
            turn = max(turn, score)
        basket.left_out += skipped
        self._turns[shared] = turn
        return len(basket.messages) - before

    def _next_lane(self, shared: str, tenant: str, affinity: str) -> str | None:
        """The list of the tenant's that is next; ``None`` where all that it has is meant for others."""
        affine, common = self._affine[shared, tenant], _lane(shared, tenant)
        if affinity in affine:
            return _lane(shared, tenant, affinity)
        if not affine or self._lists[common]:
            return common
        oldest, found = min((since, name) for name, since in affine.items())
        return _lane(shared, tenant, found) if oldest <= self._clock() - COURTESY_SECONDS else None

    def _served(self, shared: str, tenant: str, name: str) -> None:
        """One message was taken of a lane."""
        affine, affinity = self._affine[shared, tenant], _owner(name)[1] if name != shared else ""
        if affinity and not self._lists[name]:
            del affine[affinity]
        elif affinity:
            affine[affinity] = self._clock()
        if not affine and not self._lists[_lane(shared, tenant)]:
            del self._lanes[shared][tenant]

    def _pop(self, name: str, count: int) -> Iterator[bytes]:
        waiting = self._lists[name]
        for _ in range(min(count, len(waiting))):
            yield waiting.pop()


def _shared(name: str) -> str:
    """The shared list beside which a lane lies."""
    return name.removeprefix(keys.LANE_PREFIX).partition(":")[0] if name.startswith(keys.LANE_PREFIX) else name


def _owner(name: str) -> tuple[str, str]:
    """The tenant and the affinity of a lane."""
    tenant, _, affinity = name.removeprefix(keys.LANE_PREFIX).partition(":")[2].partition("@")
    return tenant, affinity


def _lane(shared: str, tenant: str, affinity: str = "") -> str:
    lane = f"{tenant}@{affinity}" if affinity else tenant
    return f"{keys.LANE_PREFIX}{shared}:{lane}" if lane else shared
