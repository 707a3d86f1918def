"""The requests in an engine's hands, each in one state. The only place where a state changes.

Who moves a request from which state to which: ``docs/life-of-a-request.md``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from workers.requests.inflight import InFlight, State

NEXT: Mapping[State, frozenset[State]] = {
    State.CLAIMED: frozenset({State.ASKING, State.WAITING, State.ALONE, State.ENDED}),
    State.ASKING: frozenset({State.WAITING, State.ALONE, State.ENDED}),
    State.WAITING: frozenset({State.RUNNING, State.ENDED}),
    State.ALONE: frozenset({State.RUNNING, State.ENDED}),
    State.RUNNING: frozenset({State.RESTING, State.ENDED}),
    State.RESTING: frozenset({State.WAITING, State.ALONE, State.ENDED}),
    State.ENDED: frozenset(),
}
"""Which state may follow which. A request that has ended leaves the table when its end is written."""


class RequestTable:
    """What was claimed and is not settled. For the loop only."""

    def __init__(self) -> None:
        self._by_state: dict[State, dict[InFlight, None]] = {state: {} for state in State}

    def __len__(self) -> int:
        return sum(map(len, self._by_state.values()))

    def __iter__(self) -> Iterator[InFlight]:
        return (item for items in self._by_state.values() for item in items)

    def enter(self, item: InFlight) -> None:
        """A request was claimed."""
        self._by_state[item.state][item] = None

    def move(self, item: InFlight, state: State) -> None:
        """Bring a request into another state; raise :class:`RuntimeError` where that cannot follow its present one."""
        if state not in NEXT[item.state]:
            raise RuntimeError(f"a request that is {item.state} cannot become {state}")
        self._by_state[item.state].pop(item, None)
        item.state = state
        self._by_state[state][item] = None

    def leave(self, item: InFlight) -> None:
        """A request is settled, or another worker has it."""
        self._by_state[item.state].pop(item, None)
        item.state = State.ENDED

    def count(self, state: State) -> int:
        """How many requests are in this state."""
        return len(self._by_state[state])

    def all(self, *states: State) -> list[InFlight]:
        """The requests that are in one of these states, those of each in the order in which they came into it."""
        return [item for state in states for item in self._by_state[state]]
