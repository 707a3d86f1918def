"""Every way to submit a request, on a real broker with a real worker."""

from __future__ import annotations

import asyncio

import pytest
from celery import chain, chord, group

from producer import AsyncClient, InferenceRequest, RequestStatus
from shared.errors import Cancelled, NoEngineAvailable
from tests.support.fleet import FleetUnderTest
from tests.support.requests import ECHO, bare_app
from tests.support.waiting import eventually


def test_client_gets_a_result_with_timing_usage_and_worker(fleet: FleetUnderTest) -> None:
    """A submitted request comes back as an InferenceResult that says who ran it and how long each part took."""
    result = fleet.client.submit(ECHO).result(10)

    assert result.text == "olleh"
    assert (result.engine_used, result.batch_size, result.cache_hit) == ("fake", 1, False)
    assert result.metadata["usage"] == {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}
    assert set(result.metadata["timing"]) == {"queued_ms", "batched_ms", "prefill_ms", "decode_ms", "engine_ms"}
    assert result.metadata["hops"] == []
    assert result.latency_ms > 0


def test_status_follows_the_request(fleet: FleetUnderTest) -> None:
    """A handle says pending until there is a record, then how it ended; a second handle finds the same."""
    handle = fleet.client.submit(ECHO)
    handle.result(10)

    assert handle.status() is RequestStatus.SUCCEEDED
    assert fleet.client.handle(handle.id).result(5).text == "olleh"
    assert fleet.client.status("nobody-knows-it") is RequestStatus.PENDING


def test_map_keeps_order_and_yields_errors_in_place(fleet: FleetUnderTest) -> None:
    """Results come in the order of the requests; with errors="yield" a failure takes its place and the rest go on."""
    prompts = [f"n{i}" if i % 10 else "!bad" for i in range(200)]

    outcomes = list(
        fleet.client.map(({"model": "echo", "inputs": {"prompt": p}} for p in prompts), window=32, errors="yield")
    )

    assert len(outcomes) == 200
    for prompt, outcome in zip(prompts, outcomes, strict=True):
        assert (str(outcome) if prompt == "!bad" else outcome.text) == (
            "the fake engine was told to refuse this request" if prompt == "!bad" else prompt[::-1]
        )


def test_asyncio_twin(fleet: FleetUnderTest) -> None:
    """The asyncio client submits, awaits, maps and cancels like the other."""

    async def main() -> list[str]:
        async with AsyncClient(settings=fleet.settings) as client:
            first = await client.submit(ECHO)
            texts = [(await first.result(10)).text]
            texts += [outcome.text async for outcome in client.map([ECHO, ECHO], window=2)]
            handles = await client.submit_many([ECHO] * 3)
            texts += [result.text for result in await asyncio.gather(*(handle.result(10) for handle in handles))]
            return texts

    assert asyncio.run(main()) == ["olleh"] * 6


def test_bare_celery_app_submits_and_reads_its_async_result(fleet: FleetUnderTest) -> None:
    """send_task by name from an app without our code works, and AsyncResult reads the answer."""
    app = bare_app(fleet.url)

    answer = app.send_task("muai.infer", kwargs={"request": ECHO}, queue="fake")

    value = answer.get(timeout=10)
    assert value["outputs"]["text"] == "olleh"
    assert (answer.state, value["engine_used"]) == ("SUCCESS", "fake")


def test_bare_celery_app_gets_the_callers_error(fleet: FleetUnderTest) -> None:
    """A failure reaches a bare app as an exception with the error's name and text."""
    app = bare_app(fleet.url)

    answer = app.send_task("muai.infer", kwargs={"request": {"model": "echo", "inputs": {}}}, queue="fake")

    with pytest.raises(Exception, match="a generate request needs inputs.prompt") as caught:
        answer.get(timeout=10)
    assert type(caught.value).__name__ == "BadRequest"


def test_chain_group_and_chord_over_infer(fleet: FleetUnderTest) -> None:
    """Celery's canvases work over muai.infer: a step without inputs works on the answer before it."""
    app = bare_app(fleet.url)

    def infer(**request: object):
        return app.signature("muai.infer", kwargs={"request": {"model": "echo", **request}}, queue="fake")

    chained = chain(infer(inputs={"prompt": "abc"}), infer(), infer()).apply_async()
    grouped = group(infer(inputs={"prompt": f"g{i}"}) for i in range(5)).apply_async()
    chorded = chord([infer(inputs={"prompt": f"c{i}"}) for i in range(3)])(infer())

    assert chained.get(timeout=10)["outputs"]["text"] == "cba"
    assert [value["outputs"]["text"] for value in grouped.get(timeout=10)] == [f"{i}g" for i in range(5)]
    assert sorted(chorded.get(timeout=10)["outputs"]["text"].split("\n")) == ["c0", "c1", "c2"]


def test_a_failing_step_fails_its_chain(fleet: FleetUnderTest) -> None:
    """The last step of a chain whose first step failed has the first one's error; nobody waits for ever."""
    app = bare_app(fleet.url)
    bad = app.signature("muai.infer", kwargs={"request": {"model": "echo", "inputs": {"prompt": "!bad"}}}, queue="fake")
    good = app.signature("muai.infer", kwargs={"request": {"model": "echo"}}, queue="fake")

    last = chain(bad, good).apply_async()

    with pytest.raises(Exception, match="told to refuse"):
        last.get(timeout=10)


def test_countdown_waits_in_the_broker(fleet: FleetUnderTest) -> None:
    """A request with a countdown runs when its time has come, and holds no place in a worker until then."""
    app = bare_app(fleet.url)
    answer = app.send_task("muai.infer", kwargs={"request": ECHO}, queue="fake", countdown=1.2)

    assert eventually(lambda: fleet.client.queue_lengths()["leased"] == 1)
    assert not answer.ready()
    assert answer.get(timeout=10)["outputs"]["text"] == "olleh"


def test_expired_task_is_revoked(make_fleet) -> None:
    """A task whose ``expires`` passed before a worker came is revoked, as Celery does it."""
    fleet = make_fleet()
    app = bare_app(fleet.url)
    answer = app.send_task("muai.infer", kwargs={"request": ECHO}, queue="fake", expires=0.05)

    fleet.start_worker()  # takes longer than that

    eventually(lambda: answer.state == "REVOKED", what="the revocation")


def test_cancel_before_a_worker_comes(make_fleet) -> None:
    """A cancelled request is never run, its caller gets Cancelled, and a second cancel says it was too late."""
    fleet = make_fleet()
    worker = fleet.start_worker()
    handle = fleet.client.submit(ECHO, timeout=60)
    handle.result(10)
    worker.terminate()
    worker.wait(30)
    app = bare_app(fleet.url)
    waiting = app.send_task(
        "muai.infer", kwargs={"request": {"model": "echo", "inputs": {"prompt": "!fail"}}}, queue="fake"
    )

    assert fleet.client.cancel(waiting.id) is True
    assert fleet.client.cancel(waiting.id) is False
    assert fleet.client.cancel(handle.id) is False
    fleet.start_worker()
    assert fleet.client.submit(ECHO).result(10).text == "olleh"
    with pytest.raises(Cancelled):
        fleet.client.handle(waiting.id).result(5)


def test_revoke_through_celery(make_fleet) -> None:
    """app.control.revoke on a waiting request stops it, as for any task."""
    fleet = make_fleet(optimization={"fake": {"latency_ms": 400}, "batcher": {"enabled": False}})
    fleet.start_worker()
    app = bare_app(fleet.url)
    first, second = (app.send_task("muai.infer", kwargs={"request": ECHO}, queue="fake") for _ in range(2))

    app.control.revoke(second.id)

    assert first.get(timeout=10)["outputs"]["text"] == "olleh"
    eventually(lambda: second.state == "REVOKED", what="the revocation")


def test_no_worker_is_said_at_once(make_fleet) -> None:
    """Without a live worker a submit says so, and names the command that starts one."""
    fleet = make_fleet()

    with pytest.raises(NoEngineAvailable, match="celery -A workers worker -Q fake"):
        fleet.client.submit(ECHO)


def test_deadline_passes_while_nobody_can_run_it(make_fleet) -> None:
    """A request that waits past its deadline fails with DeadlineExceeded and is not run."""
    fleet = make_fleet(optimization={"fake": {"latency_ms": 1500}, "batcher": {"enabled": False}})
    fleet.start_worker()

    handles = fleet.client.submit_many([InferenceRequest.parse(ECHO) for _ in range(3)], timeout=2.8)

    names = [type(handle.outcome(10)).__name__ for handle in handles]
    assert names[0] == "InferenceResult"
    assert names[-1] == "DeadlineExceeded"
