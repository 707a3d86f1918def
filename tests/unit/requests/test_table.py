"""The table of requests, each in one state."""

from __future__ import annotations

from itertools import product

import pytest

from tests.support.items import item_of
from workers.requests.inflight import State
from workers.requests.table import NEXT, RequestTable


@pytest.mark.parametrize(("before", "after"), list(product(State, State)))
def test_only_what_may_follow_follows(before: State, after: State):
    """One that may not is an error, and nothing has changed."""
    table, item = RequestTable(), item_of()
    item.state = before
    table.enter(item)
    if after in NEXT[before]:
        table.move(item, after)
        assert table.all(after) == [item]
        return
    with pytest.raises(RuntimeError, match=f"{before} cannot become {after}"):
        table.move(item, after)
    assert (item.state, table.all(before)) == (before, [item])


def test_an_end_can_follow_every_state_and_nothing_follows_it():
    assert all(State.ENDED in following for state, following in NEXT.items() if state is not State.ENDED)
    assert NEXT[State.ENDED] == frozenset()
    assert NEXT.keys() == set(State)


def test_requests_are_in_the_order_in_which_they_came_into_their_state():
    table, items = RequestTable(), [item_of(name, lease=name) for name in "abc"]
    for item in items:
        table.enter(item)
    for item in (items[2], items[0]):
        table.move(item, State.WAITING)

    assert table.all(State.WAITING) == [items[2], items[0]]
    assert table.all(State.WAITING, State.CLAIMED) == [items[2], items[0], items[1]]
    assert [table.count(state) for state in (State.WAITING, State.CLAIMED, State.RUNNING)] == [2, 1, 0]
    assert (len(table), set(table)) == (3, set(items))


def test_what_leaves_has_ended():
    table, item = RequestTable(), item_of()
    table.enter(item)
    table.leave(item)
    table.leave(item)

    assert (len(table), item.state) == (0, State.ENDED)
