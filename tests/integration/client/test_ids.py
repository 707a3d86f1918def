"""An id stands for one request: the same again is the same request, anything else under it is a conflict."""

from __future__ import annotations

import asyncio
from pathlib import Path

import orjson
import pytest

from producer import AsyncClient, Client
from producer.batch.run import AnswerFile, BatchOptions, run_batch
from producer.client.spool_file import Spool
from producer.client.submission import Submission
from shared.contract import InferenceRequest
from shared.errors import EngineError, FleetError, IdConflict
from tests.support.fleet import FleetUnderTest
from tests.support.requests import ECHO, bare_app
from tests.support.waiting import eventually


def echo(prompt: str, request_id: str, **fields: object) -> dict[str, object]:
    """A request to the echo model under an id."""
    return {"model": "echo", "inputs": {"prompt": prompt}, "id": request_id, **fields}


def told(outcome: object) -> str:
    """The text of an answer, or the name of the error."""
    return type(outcome).__name__ if isinstance(outcome, FleetError) else outcome.text  # type: ignore[attr-defined]


def test_the_same_again_is_the_same_request(fleet: FleetUnderTest) -> None:
    """It is not run again, whoever submits it, while it is under way and after it was answered."""
    first = fleet.client.submit(echo("abc", "same"))
    again = fleet.client.submit(echo("abc", "same", params={"max_tokens": 64}, priority="high"))
    worker = first.result(10).metadata["timing"]

    with Client(settings=fleet.settings) as other:
        later = other.submit(echo("abc", "same")).result(10)

    assert again.result(10).metadata["timing"] == worker
    assert later.metadata["timing"] == worker


@pytest.mark.parametrize("answered", [False, True], ids=["under way", "answered"])
def test_another_content_under_the_id_is_a_conflict(fleet: FleetUnderTest, answered: bool) -> None:
    """The caller is told, nothing is run, and whoever waits for the first request gets its answer."""
    first = fleet.client.submit(echo("abc", f"id-{answered}"))
    if answered:
        first.result(10)

    with pytest.raises(IdConflict, match=f"id-{answered}: submitted before with another"):
        fleet.client.submit_many([echo("fine", f"fine-{answered}"), echo("xyz", f"id-{answered}")])

    assert first.result(10).text == "cba"
    assert fleet.client.recover(f"fine-{answered}") is None
    for fields in (
        {"params": {"max_tokens": 3}},
        {"kind": "chat", "inputs": {"messages": [{"role": "user", "content": "abc"}]}},
    ):
        with pytest.raises(IdConflict):
            fleet.client.submit({**echo("abc", f"id-{answered}"), **fields})


def test_a_tenant_has_ids_of_its_own(fleet: FleetUnderTest) -> None:
    """Two tenants may use the same id, and each gets its own answer; a handle's id finds it from anywhere."""
    handles = [
        fleet.client.submit(echo(f"for {name}", "order-1", tenant=name)) for name in ("acme", "umbrella", "default")
    ]

    assert [handle.result(10).text for handle in handles] == ["emca rof", "allerbmu rof", "tluafed rof"]
    assert [handle.id for handle in handles] == ["acme/order-1", "umbrella/order-1", "order-1"]
    with Client(settings=fleet.settings) as other:
        assert [other.handle(handle.id).result(5).text for handle in handles] == [
            "emca rof",
            "allerbmu rof",
            "tluafed rof",
        ]
    assert bare_app(fleet.url).AsyncResult("acme/order-1").get(timeout=5)["outputs"]["text"] == "emca rof"
    assert fleet.client.submit(echo("for acme", "acme/order-1", tenant="acme")).result(5).text == "emca rof"


def test_a_conflict_inside_a_map_is_told_in_its_place(fleet: FleetUnderTest) -> None:
    """The others go on, in one call and over calls; the same request twice has the same answer twice."""
    requests = [echo("a1", "m1"), echo("b2", "m2"), echo("c3", "m1"), echo("a1", "m1"), echo("d4", "m4")]

    outcomes = list(fleet.client.map(requests, errors="yield"))

    assert list(map(told, outcomes)) == ["1a", "2b", "IdConflict", "1a", "4d"]
    assert list(map(told, fleet.client.map([echo("other", "m4"), echo("b2", "m2")], errors="yield"))) == [
        "IdConflict",
        "2b",
    ]


def test_the_same_holds_for_asyncio(fleet: FleetUnderTest) -> None:
    async def main() -> list[str]:
        async with AsyncClient(settings=fleet.settings) as client:
            first = await client.submit(echo("abc", "async"))
            with pytest.raises(IdConflict):
                await client.submit(echo("xyz", "async"))
            found = [told(one) async for one in client.map([echo("abc", "async"), echo("q", "async")], errors="yield")]
            return [(await first.result(10)).text, *found]

    assert asyncio.run(main()) == ["cba", "cba", "IdConflict"]


def test_the_id_of_a_celery_task_is_one_too(fleet: FleetUnderTest) -> None:
    """What a bare Celery app has sent under the id, our client does not get for another request."""
    app = bare_app(fleet.url)
    task = app.send_task("muai.infer", kwargs={"request": ECHO}, queue="fake", task_id="task-1")
    task.get(timeout=10)

    with pytest.raises(IdConflict):
        fleet.client.submit(echo("another", "task-1"))
    assert fleet.client.submit({**ECHO, "id": "task-1"}).result(10).text == "olleh"


def test_what_failed_may_be_submitted_again(make_fleet) -> None:
    """It runs again under its id; another content under the id of a failure is a conflict all the same."""
    fleet: FleetUnderTest = make_fleet()
    fleet.start_worker()
    failing = echo("!fail", "again")
    with pytest.raises(EngineError):
        fleet.client.submit(failing).result(10)

    again = fleet.client.submit(failing)
    with pytest.raises(EngineError):
        again.result(10)
    eventually(lambda: fleet.client.recover("again") is not None, 5, "its record")
    with pytest.raises(IdConflict):
        fleet.client.submit(echo("abc", "again"))


def test_a_cancelled_request_may_be_submitted_again(make_fleet) -> None:
    """Once no worker has it any longer it runs, and is answered."""
    fleet: FleetUnderTest = make_fleet(optimization={"fake": {"latency_ms": 300}, "batcher": {"enabled": False}})
    fleet.start_worker()
    running = fleet.client.submit(echo("first", "first"))
    waiting = fleet.client.submit(echo("abc", "waiting"))
    assert waiting.cancel()
    running.result(10)

    def answered() -> bool:
        outcome = fleet.client.submit(echo("abc", "waiting")).outcome(10)
        return told(outcome) == "cba"

    eventually(answered, 10, "the request that was cancelled before")


@pytest.mark.parametrize("end", ["cancelled", "failed"])
def test_a_submit_that_is_tried_again_by_itself_runs_nothing_again(
    fleet: FleetUnderTest, tmp_path: Path, end: str
) -> None:
    """What waits in the spool may have been taken, and have ended, before: that end stands."""
    request_id = f"tried-{end}"
    if end == "cancelled":
        fleet.client.cancel(request_id)
    else:
        with pytest.raises(EngineError):
            fleet.client.submit(echo("!fail", request_id)).result(10)
    before = fleet.client.recover(request_id)
    spool = Spool(tmp_path / "spool", 10**6)
    prompt = "!fail" if end == "failed" else "abc"
    spool.add([Submission(InferenceRequest.parse(echo(prompt, request_id)))])

    assert fleet.client.deliver(spool) == 1

    spool.close()
    assert sum(fleet.client.queue_lengths().values()) == 0
    assert str(fleet.client.recover(request_id)) == str(before)


def test_batch_runs_do_not_get_each_others_answers(fleet: FleetUnderTest, tmp_path: Path) -> None:
    """Two files whose lines have the same ids are answered each by itself; a line that repeats an id is told so."""

    def run(name: str, lines: list[dict[str, object]]) -> list[dict[str, object]]:
        source, target = tmp_path / f"{name}.jsonl", tmp_path / f"{name}-out.jsonl"
        source.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
        output = AnswerFile(target)
        with source.open("rb") as stream:
            run_batch(fleet.client, stream, output, BatchOptions(model="echo"), lambda *_: None)
        output.close()
        return [orjson.loads(line) for line in target.read_bytes().splitlines()]

    one = run("one", [{"custom_id": "1", "prompt": "abc"}, {"id": "2", "prompt": "def", "tenant": "acme"}])
    two = run("two", [{"custom_id": "1", "prompt": "uvw"}, {"id": "2", "prompt": "xyz", "tenant": "acme"}])
    three = run("three", [{"id": "1", "prompt": "abc"}, {"id": "1", "prompt": "abd"}, {"id": "1", "prompt": "abc"}])

    texts = [[line["result"]["outputs"]["text"] for line in found] for found in (one, two)]  # type: ignore[index]
    assert texts == [["cba", "fed"], ["wvu", "zyx"]]
    assert [(line["id"], line.get("custom_id")) for line in two] == [("1", "1"), ("2", None)]
    assert ["result" in line or line["error"]["type"] for line in three] == [True, "IdConflict", True]  # type: ignore[index]
