"""What moves requests through the broker, in memory and on a real one: the same steps have the same results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from shared import keys, wire
from shared.contract import InferenceRequest, Inputs
from shared.errors import EngineError, IdConflict
from shared.limits import Limits, LimitsInForce
from shared.settings import FleetSettings, Settings, TenantSettings
from tests.support.brokers import MemorySide, RedisSide, Side, cancelled_record
from tests.support.clock import ManualClock
from workers.broker.delivery import Claim, Deadline, Settlement, Verdict, Written

QUEUE = "fake"
LEASE = 10.0
FLEET = FleetSettings(
    lease_seconds=LEASE,
    starvation_limit=2,
    tenants={"acme": TenantSettings(weight=2, in_flight_share=0.25), "*": TenantSettings(weight=1)},
)
LIMITS = Limits.of(Settings(fleet=FLEET))
REPLY = keys.reply_stream("test")


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture(params=["memory", "redis"])
def side(request: pytest.FixtureRequest, clock: ManualClock) -> Iterator[Side]:
    """Either broker, empty."""
    if request.param == "memory":
        yield MemorySide(clock, FLEET, LimitsInForce(LIMITS))
        return
    real = RedisSide(request.getfixturevalue("broker").url, clock, FLEET, LimitsInForce(LIMITS))
    yield real
    real.close()


def success(request_id: str) -> bytes:
    return wire.success_meta(request_id, b'{"n": 1}')


def leases_of(claim: Claim) -> list[str]:
    return [message.lease for message in claim.messages]


def submitted(side: Side, list_name: str, request_id: str, message: bytes, content: str = "") -> bool | None:
    """Whether a request was pushed; ``None`` where its id stands for another content."""
    try:
        return side.submit(list_name, request_id, message, content)
    except IdConflict:
        return None


# -- examples: what each command promises -----------------------------------------------------------------------------


def test_a_request_is_claimed_settled_and_answered(side: Side):
    """A result is written where it is looked up and where its caller reads, and the lease is gone."""
    assert side.submit("fake", "a", b"message")
    (message,) = side.delivery.claim(QUEUE, 5).messages

    written = side.delivery.settle(
        [Settlement(message.lease, result_key=keys.result_key("a"), record=success("a"), reply=REPLY, request_id="a")]
    )

    state = side.state()
    assert (message.payload, written) == (b"message", [Written.DONE])
    assert list(state["records"]) == [keys.result_key("a")]
    assert state["replies"] == {REPLY: list(state["records"].values())}
    assert not state["leases"]
    assert not state["under way"]


def test_an_id_is_taken_once_while_it_is_under_way_and_when_it_has_its_answer(side: Side):
    assert side.submit("fake", "a", b"message")
    assert not side.submit("fake", "a", b"message")
    (lease,) = leases_of(side.delivery.claim(QUEUE, 5))
    side.delivery.settle([Settlement(lease, result_key=keys.result_key("a"), record=success("a"))])

    assert not side.submit("fake", "a", b"message")
    assert side.delivery.claim(QUEUE, 5).messages == []


def test_an_id_stands_for_its_content(side: Side):
    """While it is under way, and while its result or its failure is kept, another content is a conflict."""
    key = keys.result_key("a")
    for record in (success("a"), wire.failure_meta("a", EngineError("no"), content="11")):
        assert submitted(side, "fake", "a", b"message", "11")
        assert submitted(side, "fake", "a", b"another", "22") is None
        (lease,) = leases_of(side.delivery.claim(QUEUE, 5))
        assert submitted(side, "fake", "a", b"another", "22") is None
        side.delivery.settle([Settlement(lease, result_key=key, record=record, request_id="a")])
        known = b'"content"' in record
        assert submitted(side, "fake", "a", b"another", "22") is (None if known else False)
        side.forget("a")


def test_what_failed_or_was_cancelled_may_be_submitted_again(side: Side):
    """Its record goes, and so does the memory of its cancellation: it is run, and has the answer of this time."""
    key = keys.result_key("a")
    failure = wire.failure_meta("a", EngineError("no"), content="11")
    assert submitted(side, "fake", "a", b"message", "11")
    (lease,) = leases_of(side.delivery.claim(QUEUE, 5))
    side.delivery.settle([Settlement(lease, result_key=key, record=failure, request_id="a")])

    assert submitted(side, "fake", "a", b"message", "11")
    assert side.state()["records"] == {}
    assert side.cancel("a", cancelled_record("a"))
    assert submitted(side, "fake", "a", b"message", "11") is False  # a worker is still to drop it
    (lease,) = leases_of(side.delivery.claim(QUEUE, 5))
    side.delivery.settle([Settlement(lease, result_key=key, record=cancelled_record("a"), request_id="a")])
    assert submitted(side, "fake", "a", b"message", "22")
    (lease,) = leases_of(side.delivery.claim(QUEUE, 5))
    assert side.delivery.cancelled_among(["a"]) == set()
    written = side.delivery.settle([Settlement(lease, result_key=key, record=success("a"), request_id="a")])
    assert written == [Written.DONE]
    assert b"SUCCESS" in side.state()["records"][key]


def test_a_cancellation_outlives_its_record(side: Side):
    """Who claims the request later knows of it, whoever sent it, and writes no second record; then it is forgotten."""
    key = keys.result_key("a")
    side.submit("fake", "a", b"message")
    (lease,) = leases_of(side.delivery.claim(QUEUE, 1))
    assert side.cancel("a", cancelled_record("a"))
    side.forget("a")

    assert side.delivery.cancelled_among(["a"]) == {"a"}
    assert side.delivery.begin([(lease, "a", "")]) == [Verdict.REVOKED]
    ending = Settlement(lease, key, cancelled_record("a"), reply=REPLY, request_id="a", cancelled=True)
    assert side.delivery.settle([ending]) == [Written.CANCELLED]
    assert side.state()["records"] == {}
    assert side.state()["cancelled"] == {}
    assert not side.state()["under way"]


def test_what_is_submitted_again_was_not_cancelled(side: Side):
    """Also where the record is gone by then."""
    side.submit("fake", "a", b"message")
    (lease,) = leases_of(side.delivery.claim(QUEUE, 1))
    side.delivery.settle([Settlement(lease, request_id="a")])
    side.cancel("a", cancelled_record("a"))
    side.forget("a")

    assert side.submit("fake", "a", b"message")
    assert side.delivery.cancelled_among(["a"]) == set()


def test_the_first_terminal_record_stands(side: Side):
    """A cancelled request keeps that record, its caller is given it, and what would have followed does not."""
    side.submit("fake", "a", b"message")
    (lease,) = leases_of(side.delivery.claim(QUEUE, 1))
    assert side.cancel("a", cancelled := cancelled_record("a"))
    assert side.delivery.cancelled_among(["a", "b"]) == {"a"}

    written = side.delivery.settle(
        [Settlement(lease, result_key=keys.result_key("a"), record=success("a"), reply=REPLY, dead_reason="too late")]
    )

    assert written == [Written.CANCELLED]
    assert side.state()["records"] == {keys.result_key("a"): cancelled}
    assert side.state()["replies"] == {REPLY: [cancelled]}
    assert side.state()["dead"] == []
    assert not side.cancel("a", cancelled_record("a"))


def test_a_request_that_was_cancelled_goes_on_to_where_it_is_ended(side: Side):
    """It keeps its record; one that has its answer does not go on."""
    for name in ("a", "b"):
        side.submit("fake", name, name.encode())
    first, second = leases_of(side.delivery.claim(QUEUE, 2))
    side.cancel("a", cancelled := cancelled_record("a"))
    retry = wire.failure_meta("a", EngineError("broke"), status="RETRY")
    hops = [
        Settlement(lease, keys.result_key("a"), retry, push_list="onnx", push_message=name)
        for lease, name in ((first, "a"), (second, "b"))
    ]
    assert side.delivery.settle(hops[:1]) == [Written.DONE]
    assert side.state()["records"] == {keys.result_key("a"): cancelled}
    assert side.state()["lists"] == {"onnx": [b"a"]}

    (third,) = leases_of(side.delivery.claim("onnx", 1))
    side.submit("fake", "c", b"c")
    (fourth,) = leases_of(side.delivery.claim(QUEUE, 1))
    side.delivery.settle([Settlement(third), Settlement(fourth, keys.result_key("c"), success("c"))])
    hop = Settlement(second, keys.result_key("c"), retry, push_list="onnx", push_message="b")
    assert side.delivery.settle([hop]) == [Written.ANSWERED]
    assert side.state()["lists"] == {}


def test_a_lease_that_is_lost_writes_nothing(side: Side, clock: ManualClock):
    """It expired, and who swept has it under another name."""
    side.submit("fake", "a", b"message")
    (lease,) = leases_of(side.delivery.claim(QUEUE, 1))
    assert side.delivery.sweep() == (LEASE, [])
    clock.advance(LEASE)
    _, (swept,) = side.delivery.sweep()

    written = side.delivery.settle([Settlement(lease, result_key=keys.result_key("a"), record=success("a"))])

    assert (swept.list_name, swept.payload) == ("fake", b"message")
    assert written == [Written.LOST]
    assert side.state()["records"] == {}
    assert list(side.state()["leases"]) == [swept.lease]


def test_a_delayed_message_comes_back_in_front_at_its_time(side: Side, clock: ManualClock):
    side.submit("fake", "a", b"first")
    (lease,) = leases_of(side.delivery.claim(QUEUE, 1))
    side.delivery.settle([Settlement(lease, due_ms=int(clock.now * 1000) + 500)])
    side.submit("fake", "b", b"second")

    assert side.delivery.sweep() == (0.5, [])
    clock.advance(0.5)
    assert side.delivery.sweep() == (float("inf"), [])
    assert [message.payload for message in side.delivery.claim(QUEUE, 5).messages] == [b"first", b"second"]


def waits(side: Side, due: dict[str, float], *, queue: str = "fake") -> None:
    """Submit and claim these, each of which is to wait until its time, in ms from now."""
    for name in due:
        side.submit(queue, name, name.encode())
    now = side.now_ms()
    claim = side.delivery.claim(queue, len(due))
    side.delivery.settle(
        [
            Settlement(message.lease, due_ms=now + due[message.payload.decode()], request_id=message.payload.decode())
            for message in claim.messages
        ]
    )


def drained(side: Side, queue: str = QUEUE) -> list[str]:
    """The names of all messages in the order in which they are claimed."""
    return [message.payload.decode() for message in side.delivery.claim(queue, 100_000).messages]


def test_delayed_messages_that_are_due_together_come_back_in_their_order(side: Side, clock: ManualClock):
    """By their times, to the fraction of a millisecond; those of the same time as they were claimed."""
    waits(side, {f"r{number}": 500 for number in range(12)} | {"sooner": 499.75, "later": 500.25})
    side.submit("fake", "younger", b"younger")
    clock.advance(0.501)
    side.delivery.sweep()

    assert drained(side) == ["sooner", *(f"r{number}" for number in range(12)), "later", "younger"]


def test_a_delayed_message_comes_back_behind_those_that_came_back_before_it(side: Side, clock: ManualClock):
    """Also where some of those were claimed meanwhile, and where all of them were."""
    waits(side, {"a": 100, "b": 100, "c": 200, "d": 300, "e": 400})
    side.submit("fake", "younger", b"younger")
    for _ in range(3):
        clock.advance(0.1)
        side.delivery.sweep()
    (first,) = side.delivery.claim(QUEUE, 1).messages
    side.delivery.settle([Settlement.give_back(first.lease)])
    assert [message.payload for message in side.delivery.claim(QUEUE, 4).messages] == [b"a", b"b", b"c", b"d"]
    clock.advance(0.1)
    side.delivery.sweep()

    assert drained(side) == ["e", "younger"]


def test_each_list_has_its_own_order(side: Side, clock: ManualClock):
    """Priorities and lanes are kept."""
    urgent, lane = keys.list_of(QUEUE, 0), keys.list_of(QUEUE, 0, "acme")
    waits(side, {"a": 100, "b": 100}, queue=QUEUE)
    for name, where in (("u", urgent), ("v", lane)):
        side.submit(where, name, name.encode())
    claim = side.delivery.claim(QUEUE, 9)
    side.delivery.settle([Settlement(one.lease, due_ms=side.now_ms() + 50) for one in claim.messages])
    clock.advance(0.1)
    side.delivery.sweep()

    assert side.state()["lists"] == {"fake": [b"u", b"a", b"b"], lane: [b"v"]}


def test_expired_leases_are_taken_over_in_the_order_of_their_claims(side: Side, clock: ManualClock):
    """And before what was delayed is looked at: of that there may be much."""
    names = [f"r{number}" for number in range(12)]
    waits(side, {"delayed": 0})
    for name in names:
        side.submit("fake", name, name.encode())
    side.delivery.claim(QUEUE, len(names))
    clock.advance(LEASE)
    _, swept = side.delivery.sweep()

    assert [one.payload.decode() for one in swept] == names
    assert side.state()["lists"] == {"fake": [b"delayed"]}


# -- deadlines --------------------------------------------------------------------------------------------------------


def request_message(request_id: str) -> bytes:
    """A message as our client writes it."""
    return wire.encode_request(
        InferenceRequest(id=request_id, model="echo", inputs=Inputs(prompt=request_id)), QUEUE, sent=1.0
    )


def entries(side: Side) -> list[str]:
    """The requests, with their lists, whose deadlines are known."""
    return sorted(side.state()["deadlines"])


def test_what_is_late_is_taken_over_from_where_it_waits(side: Side, clock: ManualClock):
    """From the middle of its list or its tenant's lane, which is as if it had never been there; once."""
    start, lane = clock(), keys.list_of(QUEUE, 3, "acme")
    messages = {name: request_message(name) for name in "abcd"}
    for name in "abc":
        side.submit("fake", name, messages[name], deadline=start + 5 if name == "b" else None)
    side.submit(lane, "d", messages["d"], deadline=start + 4)
    assert side.delivery.late() == (4.25, [])
    clock.advance(5.25)

    _, late = side.delivery.late()

    assert {(one.list_name, one.payload, one.deadline) for one in late} == {
        ("fake", messages["b"], start + 5), (lane, messages["d"], start + 4),
    }  # fmt: skip
    assert side.state()["lists"] == {"fake": [messages["a"], messages["c"]]}
    assert side.state()["in flight"] == {"acme": 1}
    assert entries(side) == []
    side.delivery.settle([Settlement(one.lease) for one in late])
    assert side.state()["in flight"] == {}
    assert side.delivery.late() == (float("inf"), [])


def test_a_deadline_goes_where_the_message_goes_and_ends_with_the_request(side: Side, clock: ManualClock):
    """It hops, is given back and delayed; as long as a worker has it nobody else ends it."""
    start, message = clock(), request_message("a")
    side.submit("fake", "a", message, deadline=start + 5)
    (lease,) = leases_of(side.delivery.claim(QUEUE, 1))
    here, there = Deadline("a", "fake", start + 5), Deadline("a", "onnx", start + 5)
    side.delivery.settle([Settlement(lease, push_list="onnx", push_message=message, deadline=here)])
    assert entries(side) == [there.entry]
    (lease,) = leases_of(side.delivery.claim("onnx", 1))
    side.delivery.settle([replace(Settlement.give_back(lease), deadline=there)])
    (lease,) = leases_of(side.delivery.claim("onnx", 1))
    side.delivery.settle([Settlement(lease, due_ms=side.now_ms() + 1000, request_id="a", deadline=there)])
    assert entries(side) == [there.entry]
    clock.advance(1)
    side.delivery.sweep()
    (lease,) = leases_of(side.delivery.claim("onnx", 1))
    clock.advance(5)
    assert side.delivery.late()[1] == []
    side.delivery.settle([Settlement(lease, request_id="a", deadline=there)])

    assert entries(side) == []


def test_a_deadline_whose_message_is_gone_is_forgotten(side: Side, clock: ManualClock):
    side.submit("fake", "a", request_message("a"), deadline=clock() + 5)
    side.delivery.claim(QUEUE, 1)
    clock.advance(14)
    side.delivery.late()
    assert len(entries(side)) == 1
    clock.advance(2)
    side.delivery.late()

    assert entries(side) == []


def test_the_first_deadline_that_is_noted_stands(side: Side):
    first, second = Deadline("a", "fake", 5.5), Deadline("b", "fake", 6.0)
    assert side.delivery.deadlines([first]) == [5.5]
    assert side.delivery.deadlines([Deadline("a", "fake", 9.0), second]) == [5.5, 6.0]


def test_a_look_finds_what_others_than_our_client_have_sent(side: Side):
    foreign = [b'{"headers": {}, "n": %d}' % number for number in range(3)]
    side.submit("fake", "a", request_message("a"))
    for number, message in enumerate(foreign):
        side.submit(keys.list_of(QUEUE, 3 * number), str(number), message)
    _, found = side.delivery.unread()

    assert sorted(found) == [(keys.list_of(QUEUE, 3 * number), message) for number, message in enumerate(foreign)]


def test_an_id_runs_once_at_a_time(side: Side):
    """A second message of an id waits while the first has its lease, and is done when that has its answer."""
    side.submit("fake", "other", b"x")
    side.submit("fake", "another", b"y")
    first, second = leases_of(side.delivery.claim(QUEUE, 2))

    assert side.delivery.begin([(first, "a", ""), (second, "a", "")]) == [Verdict.RUN, Verdict.WAIT]
    assert side.delivery.begin([(first, "a", "")]) == [Verdict.RUN]
    assert side.delivery.begin([(first, "other", "")]) == [Verdict.WAIT]
    side.delivery.settle([Settlement(first, result_key=keys.result_key("a"), record=success("a"))])
    assert side.delivery.begin([(second, "a", "")]) == [Verdict.DONE]


def test_a_delayed_request_that_is_cancelled_comes_back_at_once(side: Side):
    """It is ended by whoever claims it then; begun again, it is known to be cancelled."""
    side.submit("fake", "a", b"message")
    (lease,) = leases_of(side.delivery.claim(QUEUE, 5))
    side.delivery.settle([Settlement(lease, due_ms=int(4e12), request_id="a")])
    assert side.delivery.sweep()[1] == []
    assert side.delivery.claim(QUEUE, 5).messages == []

    side.cancel("a", cancelled_record("a"))
    side.delivery.sweep()

    (again,) = leases_of(side.delivery.claim(QUEUE, 5))
    assert side.delivery.begin([(again, "a", "")]) == [Verdict.REVOKED]


def claimed(side: Side, size: int) -> str:
    """The first letters of all messages, in the order in which claims of this size bring them."""
    order = ""
    while found := side.delivery.claim(QUEUE, size).messages:
        order += "".join(message.payload[:1].decode() for message in found)
    return order


def test_tenants_take_turns_by_their_weights(side: Side):
    """The shared list and the lanes of one priority; acme has twice the weight."""
    side.delivery.share_out(100)
    for tenant, count in (("acme", 6), ("beta", 4), ("default", 3)):
        for number in range(count):
            side.submit(keys.list_of(QUEUE, 3, tenant), f"{tenant}-{number}", tenant.encode())

    assert claimed(side, 2) == "dabadabadabab"


def test_a_less_urgent_message_is_passed_by_so_many_only(side: Side):
    """``starvation_limit`` is two here."""
    for step, name, count in ((0, "high", 7), (3, "normal", 3), (6, "low", 2)):
        for number in range(count):
            side.submit(keys.list_of(QUEUE, step), f"{name}-{number}", name.encode())

    assert claimed(side, 3) == "hhlnhhlnhhnh"


def test_a_tenant_that_has_its_share_of_what_is_in_flight_is_left_out(side: Side):
    """Until one of its requests ends."""
    side.delivery.share_out(8)
    for number in range(4):
        side.submit(keys.list_of(QUEUE, 3, "acme"), f"a{number}", b"acme")
    first = side.delivery.claim(QUEUE, 8)
    second = side.delivery.claim(QUEUE, 8)
    side.delivery.settle([Settlement(first.messages[0].lease)])
    third = side.delivery.claim(QUEUE, 8)

    assert [len(claim.messages) for claim in (first, second, third)] == [2, 0, 1]
    assert [claim.left_out for claim in (first, second, third)] == [1, 1, 1]
    assert not second.waiting


def test_what_is_sent_soon_is_answered_in_order(side: Side):
    """Without a loop each command is waited for."""
    side.submit("fake", "a", b"message")
    answers: list[Any] = []
    side.delivery.claim_soon(QUEUE, 1, answers.append, lambda: answers.append("lost"))
    (lease,) = leases_of(answers.pop())
    side.delivery.settle_soon([Settlement.give_back(lease), Settlement("none")], answers.extend, answers.clear)
    side.delivery.wait()

    assert answers == [Written.DONE, Written.LOST]
    assert side.state()["lists"] == {"fake": [b"message"]}


# -- random steps -----------------------------------------------------------------------------------------------------

NAMES = [f"r{number}" for number in range(12)]
LISTS = [
    keys.list_of(queue, step, tenant)
    for queue, step, tenant in [
        ("fake", 0, "default"), ("fake", 3, "default"), ("fake", 6, "default"), ("fake", 3, "acme"),
        ("fake", 3, "beta"), ("fake", 0, "beta"), ("onnx", 3, "default"), ("onnx", 3, "acme"),
    ]
]  # fmt: skip


class SameOnBoth(RuleBasedStateMachine):
    """Drives both brokers, and compares what each says and what each holds afterwards."""

    url = ""

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        self.limits = LimitsInForce(LIMITS)
        self.memory = MemorySide(self.clock, FLEET, self.limits)
        self.real = RedisSide(self.url, self.clock, FLEET, self.limits)
        self.leases: list[tuple[str, str]] = []
        self.sent = 0

    def teardown(self) -> None:
        self.real.close()

    def both(self, command: str, *args: Any) -> Any:
        """The answer of either delivery, which is that of the other as well."""
        found = getattr(self.memory.delivery, command)(*args)
        assert getattr(self.real.delivery, command)(*args) == found
        return found

    def lease(self, pick: int) -> tuple[str, str]:
        """One that is or was held, and its request."""
        return self.leases[pick % len(self.leases)]

    @initialize(places=st.sampled_from([4, 100]))
    def share_out(self, places: int) -> None:
        self.both("share_out", places)

    @rule(
        name=st.sampled_from(NAMES), where=st.sampled_from(LISTS), count=st.integers(1, 9),
        content=st.sampled_from(["", "", "", "other"]),
    )  # fmt: skip
    def submit(self, name: str, where: str, count: int, content: str) -> None:
        for number in range(count):
            request_id = f"{name}-{number}"
            message = b"%d-%s" % (self.sent, request_id.encode())
            self.sent += 1
            submission = where, request_id, message, content
            assert submitted(self.memory, *submission) == submitted(self.real, *submission)

    @rule(queue=st.sampled_from(["fake", "fake", "onnx"]), limit=st.integers(1, 9))
    def claim(self, queue: str, limit: int) -> None:
        mine, other = self.memory.delivery.claim(queue, limit), self.real.delivery.claim(queue, limit)
        assert other.messages == mine.messages
        assert bool(other.waiting) == bool(mine.waiting)
        assert (other.left_out, other.cancelled) == (mine.left_out, mine.cancelled)
        if mine.messages:
            assert other.now == mine.now
        self.leases += [(message.lease, message.payload.decode().split("-", 1)[1]) for message in mine.messages]

    @precondition(lambda self: self.leases)
    @rule(
        ends=st.lists(
            st.tuples(
                st.integers(0, 30),
                st.sampled_from(
                    [
                        "done",
                        "result",
                        "error",
                        "revoked",
                        "hop",
                        "unserved",
                        "back",
                        "again",
                        "delay",
                        "dead",
                        "silent",
                    ]
                ),
            ),
            min_size=1,
            max_size=4,
        ),
        soon=st.booleans(),
    )
    def settle(self, ends: list[tuple[int, str]], soon: bool) -> None:
        settlements = [self.settlement(*self.lease(pick), end) for pick, end in ends]
        if not soon:
            self.both("settle", settlements)
            return
        answers: list[list[Written]] = []
        self.both("settle_soon", settlements, answers.append, answers.clear)
        self.both("wait")
        assert len(answers) == 2
        assert answers[0] == answers[1]

    def settlement(self, lease: str, request_id: str, end: str) -> Settlement:
        key, error = keys.result_key(request_id), EngineError("it broke")
        failure = wire.failure_meta(request_id, error)
        return {
            "done": Settlement(lease, request_id=request_id),
            "result": Settlement(lease, key, success(request_id), REPLY, request_id=request_id),
            "error": Settlement(lease, key, failure, REPLY, request_id=request_id),
            "revoked": Settlement(lease, key, cancelled_record(request_id), REPLY, request_id=request_id),
            "hop": Settlement(
                lease, key, wire.failure_meta(request_id, error, status="RETRY"), push_list=LISTS[-2],
                push_message=f"hopped-{request_id}", push_front=True,
            ),
            "unserved": Settlement(lease, push_list=LISTS[-1], push_message=f"moved-{request_id}"),
            "back": Settlement.give_back(lease),
            "again": Settlement.give_back(lease, f"again-{request_id}"),
            "delay": Settlement(lease, due_ms=int(self.clock.now * 1000) + 4000, request_id=request_id),
            "dead": Settlement(lease, key, failure, REPLY, dead_reason="it made no sense", request_id=request_id),
            "silent": Settlement(lease, "", success(request_id), REPLY, request_id=request_id),
        }[end]  # fmt: skip

    @rule()
    def sweep(self) -> None:
        _, taken = self.both("sweep")
        self.leases += [(swept.lease, swept.payload.decode().split("-", 1)[1]) for swept in taken]

    @rule(seconds=st.sampled_from([0.001, 1.0, 4.0, LEASE]))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(name=st.sampled_from(NAMES), number=st.integers(0, 3))
    def cancel(self, name: str, number: int) -> None:
        request_id, record = f"{name}-{number}", cancelled_record(name)
        assert self.memory.cancel(request_id, record) == self.real.cancel(request_id, record)

    @precondition(lambda self: self.leases)
    @rule(picks=st.lists(st.integers(0, 30), min_size=1, max_size=3), name=st.sampled_from([None, *NAMES]))
    def begin(self, picks: list[int], name: str | None) -> None:
        self.both("begin", [(lease, name or request_id, "") for lease, request_id in map(self.lease, picks)])

    @rule(names=st.lists(st.sampled_from(NAMES), max_size=4))
    def ask_for_cancellations(self, names: list[str]) -> None:
        self.both("cancelled_among", [f"{name}-0" for name in names])

    @rule(limit=st.integers(1, 5))
    def change_the_limits(self, limit: int) -> None:
        self.limits.replace(starvation_limit=limit)

    @invariant()
    def they_hold_the_same(self) -> None:
        assert self.real.state() == self.memory.state()


def test_random_steps_have_the_same_results_on_both(broker: Any) -> None:
    """Whatever is submitted, claimed, settled, swept, begun and cancelled, in whatever order."""

    class OverThisBroker(SameOnBoth):
        url = broker.url

    run_state_machine_as_test(
        OverThisBroker,
        settings=settings(
            max_examples=40, stateful_step_count=25, deadline=None, derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
