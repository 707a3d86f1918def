"""One works for all, the others wait for their turn."""

from __future__ import annotations

import threading

from producer.client.turns import Turns


def test_a_turn_that_ends_is_offered_to_who_has_waited_longest() -> None:
    """One after the other."""
    turns = Turns()
    assert turns.take_or_queue() is None
    first, second = turns.take_or_queue(), turns.take_or_queue()
    assert first is not None
    assert second is not None

    assert turns.give_up() is True

    assert (first.is_set(), second.is_set()) == (True, False)
    assert turns.take() is True
    assert turns.take() is False


def test_who_waits_no_longer_passes_an_offer_on() -> None:
    """Nobody is left waiting where nobody works."""
    turns = Turns()
    turns.take()
    events = [turns.take_or_queue() for _ in range(3)]
    first, second, third = (event for event in events if event is not None)

    turns.leave(second)
    turns.give_up()
    turns.leave(first)

    assert third.is_set()
    assert not second.is_set()
    assert turns.give_up() is False


def test_many_threads_all_have_their_turn_and_never_two_at_once() -> None:
    """However they meet."""
    turns, at_work, done = Turns(), [], []

    def work() -> None:
        for _ in range(200):
            while (event := turns.take_or_queue()) is not None:
                event.wait()
            at_work.append(threading.get_ident())
            assert len(at_work) == 1
            at_work.pop()
            done.append(1)
            turns.give_up()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert len(done) == 8 * 200
