"""When it is looked for what lost claims have leased."""

from __future__ import annotations

from collections.abc import Sequence

from tests.support.clock import ManualClock
from workers.broker.lost_claims import AGAIN_SECONDS, LostClaims

LEASE = 10.0


class Broker:
    """Has leases by the tokens of the claims that made them, and notes what it is asked."""

    def __init__(self) -> None:
        self.leases: dict[str, list[str]] = {}
        self.asked: list[list[str]] = []

    def find(self, tokens: Sequence[str]) -> list[str]:
        self.asked.append(list(tokens))
        return [lease for token in tokens for lease in self.leases.pop(token, [])]


def test_nothing_is_asked_while_no_claim_was_lost() -> None:
    broker = Broker()

    assert LostClaims(broker.find, LEASE, ManualClock()).leases() == []
    assert broker.asked == []


def test_what_lost_claims_have_leased_is_found_in_its_order() -> None:
    """Leases are numbered in the order in which they were made."""
    broker = Broker()
    lost = LostClaims(broker.find, LEASE, ManualClock())
    lost.add("a")
    lost.add("b")
    broker.leases = {"b": ["9-b"], "a": ["10-a/tenant", "8-a"]}

    assert lost.leases() == ["8-a", "9-b", "10-a/tenant"]
    assert broker.asked == [["a", "b"]]


def test_a_claim_that_the_broker_carries_out_late_is_found_later() -> None:
    """It is asked again once a second, for as long as the leases of such a claim may last, and then never again."""
    broker, clock = Broker(), ManualClock()
    lost = LostClaims(broker.find, LEASE, clock)
    lost.add("a")

    assert lost.leases() == lost.leases() == []
    broker.leases = {"a": ["1-a"]}
    clock.advance(AGAIN_SECONDS)
    assert lost.leases() == ["1-a"]
    for _ in range(100):
        clock.advance(LEASE / 100)
        lost.leases()

    assert LEASE - 1 <= len(broker.asked) <= LEASE + 2


def test_a_broker_that_fails_is_asked_again() -> None:
    clock = ManualClock()
    answers: list[list[str] | Exception] = [ConnectionError("away"), ["1-a"]]

    def find(tokens: Sequence[str]) -> list[str]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    lost = LostClaims(find, LEASE, clock)
    lost.add("a")
    try:
        lost.leases()
    except ConnectionError:
        assert lost.leases() == ["1-a"]
    else:
        raise AssertionError("what the broker raises is passed on")
