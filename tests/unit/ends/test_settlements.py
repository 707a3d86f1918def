"""What each way to end writes, and where its message goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson
import pytest

from shared import keys, wire
from shared.contract import EngineName
from shared.errors import BadRequest, DeadLettered, EngineDied, EngineError
from tests.support.items import item_of
from tests.support.memory_worker import REPLY
from workers.broker.delivery import SAME, Settlement
from workers.ends.settlements import settlement_of
from workers.requests.ending import FINAL, End, Ending
from workers.requests.inflight import InFlight

KEY = keys.result_key("a")
HERE, THERE = EngineName.FAKE, EngineName.ONNX

ENDINGS: dict[End, Callable[[InFlight], Ending]] = {
    End.RESULT: lambda item: Ending.answered(item, {"n": 1}, b'{"n":1}', 0.5),
    End.FAILURE: lambda item: Ending.failed(item, BadRequest("no")),
    End.CANCEL: Ending.cancelled,
    End.EXPIRY: Ending.expired,
    End.HOP: lambda item: Ending.hops(item, THERE, EngineError("broke"), here=HERE, now=5.0),
    End.DELAY: lambda item: Ending.delayed(item, 12.5),
    End.DEAD_LETTER: lambda item: Ending.dead(item, DeadLettered("given up"), "delivered 3 times"),
    End.GIVE_BACK: Ending.given_back,
    End.REFUSAL: lambda item: Ending.refused(item, BadRequest("no sense")),
    End.DUPLICATE: Ending.duplicate,
}
STATUS = {
    End.RESULT: "SUCCESS", End.FAILURE: "FAILURE", End.CANCEL: "REVOKED", End.EXPIRY: "REVOKED",
    End.DEAD_LETTER: "FAILURE", End.REFUSAL: "FAILURE",
}  # fmt: skip


def test_there_is_an_example_of_every_end():
    assert ENDINGS.keys() == set(End)
    assert STATUS.keys() == FINAL


@pytest.mark.parametrize("end", sorted(FINAL))
def test_a_final_end_writes_a_record_and_answers_the_caller(end: End):
    """And its message is gone, or among the dead letters."""
    found = settlement_of(ENDINGS[end](item_of()))

    assert (found.lease, found.result_key, found.reply) == ("7", KEY, REPLY)
    assert orjson.loads(found.record)["status"] == STATUS[end]
    assert (found.push_list, found.due_ms) == ("", None)
    reasons = {End.DEAD_LETTER: "delivered 3 times", End.REFUSAL: "no sense"}
    assert found.dead_reason == reasons.get(end, "")


@pytest.mark.parametrize("end", sorted(set(End) - FINAL))
def test_an_end_that_is_not_final_answers_nobody(end: End):
    found = settlement_of(ENDINGS[end](item_of()))

    assert (found.lease, found.reply, found.dead_reason) == ("7", "", "")


def test_what_is_given_back_is_in_front_as_it_was():
    assert settlement_of(Ending.given_back(item_of())) == Settlement(
        "7", push_list=SAME, push_message=SAME, push_front=True
    )


def test_a_redelivery_is_counted_in_the_message():
    item = item_of()
    item.deliveries = 1
    found = settlement_of(Ending.redelivery(item))

    assert (found.push_list, found.push_front, found.record) == (SAME, True, "")
    assert wire.own_header(orjson.loads(found.push_message)["headers"])["deliveries"] == 2


def test_a_request_that_is_passed_on_waits_where_the_other_worker_looks_first():
    """In front, with the names of those that could not answer it in time, each once."""
    item = item_of(tenant="acme", header_muai={"v": 1, "passed": ["w1", "w2"]})
    found = settlement_of(Ending.passed_on(item, "w1", "w3"))

    assert (found.push_list, found.push_front) == (keys.list_of("fake", 3, "acme", "w3"), True)
    assert wire.own_header(orjson.loads(found.push_message)["headers"])["passed"] == ["w1", "w2"]


def test_a_delay_is_in_milliseconds_and_a_duplicate_is_nothing():
    assert settlement_of(ENDINGS[End.DELAY](item_of())) == Settlement("7", request_id="a", due_ms=12500)
    assert settlement_of(ENDINGS[End.DUPLICATE](item_of())) == Settlement("7")


@pytest.mark.parametrize(("error", "outage"), [(EngineError("broke"), None), (EngineDied("gone"), True)])
def test_a_hop_is_a_retry_on_the_next_queue_with_its_history(error: Any, outage: bool | None):
    """In front of what waits there, on the list of its priority and tenant."""
    item = item_of(priority="high", tenant="acme", header_retries=1)
    found = settlement_of(Ending.hops(item, THERE, error, here=HERE, now=5.0))
    message = orjson.loads(found.push_message)
    (hop,) = wire.own_header(message["headers"])["hops"]

    assert (found.push_list, found.push_front) == (keys.list_of("onnx", 0, "acme"), True)
    assert (hop["engine"], hop["error"], hop.get("outage")) == ("fake", str(error), outage)
    assert (message["headers"]["retries"], message["body"]) == (2, item.body)
    assert wire.own_header(message["headers"])["sent"] == item.sent
    assert (found.result_key, orjson.loads(found.record)["status"]) == (KEY, "RETRY")


def test_a_hop_after_nothing_failed_writes_no_record_and_no_history():
    found = settlement_of(Ending.hops(item_of(), THERE, None, here=HERE, now=5.0))
    headers = orjson.loads(found.push_message)["headers"]

    assert (found.result_key, found.record) == ("", b"")
    assert (wire.own_header(headers)["hops"], headers["retries"]) == ([], 0)


def test_a_sender_that_wants_no_result_is_answered_and_none_is_kept():
    found = settlement_of(ENDINGS[End.RESULT](item_of(header_ignore_result=True)))

    assert (found.result_key, found.reply) == ("", REPLY)
    assert found.record


def test_a_message_without_an_id_answers_nobody():
    item = InFlight.unreadable("7", "fake", b"no JSON", BadRequest("no JSON"))

    assert settlement_of(Ending.refused(item, BadRequest("no JSON"))) == Settlement("7", dead_reason="no JSON")


def test_a_record_in_a_group_says_so_and_a_success_names_the_next_steps():
    item = item_of(header_group="g", header_parent_id="p")
    record = orjson.loads(settlement_of(ENDINGS[End.RESULT](item), [["next", None]]).record)

    assert (record["group_id"], record["parent_id"]) == ("g", "p")
    assert (record["children"], record["result"]) == ([["next", None]], {"n": 1})


@pytest.mark.parametrize(
    "ending",
    [Ending(item_of(), End.FAILURE), Ending(item_of(), End.CANCEL), Ending(item_of(), End.HOP, to=THERE),
     Ending(item_of(), End.HOP, here=HERE)],
)  # fmt: skip
def test_an_ending_that_lacks_what_its_way_needs_is_an_error(ending: Ending):
    with pytest.raises(ValueError, match="needs its error|from one engine to another"):
        settlement_of(ending)
