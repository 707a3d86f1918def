"""The states of claimed requests: each is in one, and only what may follow it follows."""

from __future__ import annotations

import pytest

from workers.requests.inflight import InFlight, State
from workers.requests.table import NEXT, RequestTable


def item(state: State = State.CLAIMED) -> InFlight:
    """A claimed message, put into a state."""
    made = InFlight("1", "fake", {"id": "a"}, {}, "", 1.0)
    made.state = state
    return made


@pytest.mark.parametrize("after", list(State))
@pytest.mark.parametrize("before", list(State))
def test_only_what_may_follow_follows(before: State, after: State) -> None:
    """A step that is not in the table of steps is an error, and the request stays where it was."""
    table, request = RequestTable(), item(before)
    table.enter(request)

    if after in NEXT[before]:
        table.move(request, after)
        assert table.all(after) == [request]
    else:
        with pytest.raises(RuntimeError, match=f"{before} cannot become {after}"):
            table.move(request, after)
        assert table.all(before) == [request]
    assert len(table) == 1


def test_what_leaves_has_ended() -> None:
    """Whatever state it was in: nothing that the engine says of it later is wanted."""
    table, request = RequestTable(), item(State.RUNNING)
    table.enter(request)

    table.leave(request)
    table.leave(request)

    assert (len(table), request.state) == (0, State.ENDED)


def test_requests_are_listed_in_the_order_in_which_they_came_into_a_state() -> None:
    """So what goes back to its queue keeps its order."""
    table, requests = RequestTable(), [item() for _ in range(3)]
    for request in requests:
        table.enter(request)
    for request in reversed(requests):
        table.move(request, State.WAITING)

    assert table.all(State.WAITING) == requests[::-1]
    assert table.count(State.CLAIMED) == 0
