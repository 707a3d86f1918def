"""Claim, lease and outcome on a real broker: nothing is lost, nothing is answered twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis

from producer import Client
from shared import keys, wire
from shared.contract import InferenceRequest
from shared.errors import DeadLettered
from tests.support.fleet import FleetUnderTest
from tests.support.requests import ECHO, bare_app
from tests.support.waiting import eventually

TOTAL = 4000
WORKERS = 4
PRIORITIES = ("high", "normal", "low")


def numbered(count: int, start: int = 0):
    """Requests with numbers for prompts and mixed priorities."""
    for number in range(start, start + count):
        yield {
            "id": f"r{number}", "model": "echo", "inputs": {"prompt": f"{number}"}, "priority": PRIORITIES[number % 3],
        }  # fmt: skip


def resident_mb(pid: int) -> float:
    """Resident memory."""
    return psutil.Process(pid).memory_info().rss / 2**20


# Requirements: 8.2
@pytest.mark.timeout(170)
def test_thousands_of_requests_over_four_workers(make_fleet, redis_client: redis.Redis) -> None:
    """Every request gets its one right answer, memory stays flat, and nothing is left in the broker."""
    fleet = make_fleet()
    for _ in range(WORKERS):
        fleet.start_worker(wait=False)
    for process in fleet.processes:
        fleet.wait_live(process)
    list(fleet.client.map(numbered(TOTAL // 2, start=10**6), window=1024))
    before = [resident_mb(process.pid) for process in fleet.processes]
    own_before = resident_mb(os.getpid())

    answers = Counter()
    workers = Counter()
    for number, result in enumerate(fleet.client.map(numbered(TOTAL), window=1024)):
        assert result.text == str(number)[::-1]
        answers[number] += 1
        workers[result.metadata["worker"]] += 1

    assert len(answers) == TOTAL
    assert set(answers.values()) == {1}
    assert len(workers) == WORKERS
    after = [resident_mb(process.pid) for process in fleet.processes]
    assert max(b - a for a, b in zip(before, after, strict=True)) < 10
    assert resident_mb(os.getpid()) - own_before < 30
    lengths = fleet.client.queue_lengths()
    assert (sum(lengths.values()), redis_client.hlen(keys.LEASE_MESSAGES)) == (0, 0)


@pytest.mark.timeout(170)
def test_a_third_of_them_from_a_stock_celery_producer(make_fleet, redis_client: redis.Redis) -> None:
    """Stock Celery's send_task, with priorities, and our client share the queue; all are answered once."""
    fleet = make_fleet()
    for _ in range(WORKERS):
        fleet.start_worker(wait=False)
    for process in fleet.processes:
        fleet.wait_live(process)
    app = bare_app(fleet.url)
    third = TOTAL // 3
    foreign: list[str] = []

    def submit_foreign() -> None:
        for n in range(third):
            request = {"model": "echo", "inputs": {"prompt": f"s{n}"}}
            sent = app.send_task("muai.infer", kwargs={"request": request}, queue="fake", priority=(0, 3, 6, 9)[n % 4])
            foreign.append(sent.id)

    stock = threading.Thread(target=submit_foreign)
    stock.start()
    ours = [result.text for result in fleet.client.map(numbered(TOTAL - third), window=1024)]
    stock.join()

    assert ours == [str(n)[::-1] for n in range(TOTAL - third)]

    def stored() -> list[bytes | None]:
        return redis_client.mget([keys.result_key(task) for task in foreign])

    eventually(lambda: all(stored()), 30, "all results of the stock producer")
    texts = [wire.loads_object(record)["result"]["outputs"]["text"] for record in stored() if record]
    assert texts == [f"s{n}"[::-1] for n in range(third)]
    assert sum(fleet.client.queue_lengths().values()) == 0


def test_urgent_requests_go_first(make_fleet) -> None:
    """Of what waits, high is started before normal, and normal before low."""
    fleet = make_fleet(optimization={"batcher": {"enabled": False}, "fake": {"latency_ms": 5}})
    first = fleet.start_worker()
    first.send_signal(signal.SIGSTOP)
    order = ("low", "normal", "high", "low", "high", "normal")
    handles = fleet.client.submit_many([{**ECHO, "priority": priority} for priority in order])

    first.send_signal(signal.SIGCONT)
    finished = [handle.result(10).metadata["timing"]["queued_ms"] for handle in handles]

    ranked = [order[place] for place in sorted(range(len(order)), key=lambda place: finished[place])]
    assert ranked == ["high", "high", "normal", "normal", "low", "low"]


def test_a_killed_workers_requests_are_run_by_another(make_fleet, redis_client: redis.Redis) -> None:
    """Kill -9 with requests in hand: once their leases expire they are run elsewhere, each answered once."""
    fleet = make_fleet(
        fleet={"lease_seconds": 1.5, "sweep_seconds": 0.3},
        optimization={"fake": {"latency_ms": 300}, "batcher": {"max_batch_size": 4}},
    )
    doomed = fleet.start_worker()
    handles = fleet.client.submit_many(list(numbered(40)))
    eventually(lambda: redis_client.zcard(keys.LEASE_INDEX) > 0)
    fleet.start_worker()

    doomed.kill()

    assert [handle.result(30).text for handle in handles] == [str(n)[::-1] for n in range(40)]
    eventually(lambda: redis_client.zcard(keys.LEASE_INDEX) == 0)


def test_a_request_longer_than_its_lease_runs_once(make_fleet, redis_client: redis.Redis) -> None:
    """The lease is renewed while a request runs: with two workers and a run of ten leases it is run by one."""
    fleet = make_fleet(fleet={"lease_seconds": 0.6, "sweep_seconds": 0.2}, optimization={"fake": {"latency_ms": 6100}})
    for _ in range(2):
        fleet.start_worker()

    result = fleet.client.submit(ECHO).result(20)

    assert result.text == "olleh"
    assert not any("expired leases" in fleet.log(process) for process in fleet.processes)


@pytest.mark.parametrize("claimed", [None, -1000])
def test_a_request_that_kills_its_workers_is_given_up(make_fleet, redis_client: redis.Redis, claimed) -> None:
    """After max_deliveries lost leases the request is dead-lettered with the reason, and its caller told.

    It makes no difference what its sender says of its deliveries.
    """
    fleet = make_fleet(
        fleet={"lease_seconds": 0.5, "sweep_seconds": 0.2, "max_deliveries": 2},
        optimization={"fake": {"latency_ms": 60_000}},
        monitoring={"server": {"graceful_shutdown_timeout": 0}},
    )  # fmt: skip
    victims = [fleet.start_worker()]
    handle = fleet.client.handle("killer")
    message = wire.encode_request(InferenceRequest.parse({**ECHO, "id": "killer"}), "fake", sent=time.time())
    header = {} if claimed is None else {"deliveries": claimed}
    redis_client.lpush("fake", wire.amended(wire.decode_envelope(message), header=header))
    eventually(lambda: redis_client.zcard(keys.LEASE_INDEX) == 1)
    victims.append(fleet.start_worker())
    victims[0].kill()
    eventually(lambda: "1 back in their queues" in fleet.log(victims[1]), what="the redelivery")
    eventually(lambda: redis_client.zcard(keys.LEASE_INDEX) == 1)
    survivor = fleet.start_worker("control")
    victims[1].kill()

    with pytest.raises(DeadLettered, match="delivered 2 times"):
        handle.result(30)

    ((_, letter),) = redis_client.xrange(keys.DEAD_LETTERS)
    assert b"delivered 2 times" in letter[b"reason"]
    assert survivor.poll() is None


def test_a_stopped_idle_worker_loses_nothing(make_fleet) -> None:
    """Requests that come while the idle worker is frozen, and then killed, are run by the next one."""
    fleet = make_fleet(fleet={"lease_seconds": 1.0, "sweep_seconds": 0.2})
    frozen = fleet.start_worker()
    assert fleet.client.submit(ECHO).result(10)
    frozen.send_signal(signal.SIGSTOP)
    handles = fleet.client.submit_many(list(numbered(6)))
    frozen.kill()

    fleet.start_worker()

    assert [handle.result(20).text for handle in handles] == [str(n) for n in range(6)]


# Requirements: 8.5
def test_sigterm_finishes_what_runs_and_gives_the_rest_back(make_fleet) -> None:
    """A worker told to stop ends its batch, returns what waits at once, exits 0, and no request fails."""
    fleet = make_fleet(optimization={"fake": {"latency_ms": 500}, "batcher": {"max_batch_size": 8}})
    leaving = fleet.start_worker()
    handles = fleet.client.submit_many(list(numbered(40)))
    eventually(lambda: fleet.client.queue_lengths()["leased"] > 0)

    leaving.terminate()
    code = leaving.wait(60)
    fleet.start_worker()

    assert code == 0
    assert [handle.result(20).text for handle in handles] == [str(n)[::-1] for n in range(40)]


def test_nothing_waits_in_one_worker_while_another_is_idle(make_fleet) -> None:
    """With batches of one that take 1.2 s, four requests are run by two workers in two rounds, not more."""
    fleet = make_fleet(optimization={"fake": {"latency_ms": 1200}, "batcher": {"enabled": False}})
    for _ in range(2):
        fleet.start_worker()
    for _ in range(2):  # both have run one, so both know how long a batch takes
        [handle.result(10) for handle in fleet.client.submit_many([ECHO, ECHO])]

    results = [handle.result(10) for handle in fleet.client.submit_many([ECHO] * 4)]

    assert sorted(Counter(result.metadata["worker"] for result in results).values()) == [2, 2]
    assert max(result.metadata["timing"]["batched_ms"] for result in results) < 1000


def test_the_same_id_is_answered_once(fleet: FleetUnderTest) -> None:
    """Submitting an id again gives its first answer."""
    first = fleet.client.submit({**ECHO, "id": "same"}).result(10)

    again = fleet.client.submit({**ECHO, "id": "same"}).result(10)

    assert again.metadata == first.metadata


STOCK_APP = """
from celery import Celery

app = Celery("stock")

@app.task(name="muai.infer")
def infer(request):
    text = "stock " + request["inputs"]["prompt"]
    return {"outputs": {"text": text}, "engine_used": "fake", "latency_ms": 0, "batch_size": 1, "metadata": {}}
"""


def test_a_stock_worker_takes_what_our_client_submits(make_fleet, tmp_path: Path) -> None:
    """A message of our client is an ordinary Celery task: a stock worker of a stock app can run it."""
    fleet = make_fleet()
    request = InferenceRequest.parse({**ECHO, "id": "to-stock", "priority": "low"})
    with redis.Redis.from_url(fleet.url) as broker:
        broker.lpush(keys.list_of("fake", 6), wire.encode_request(request, "fake", sent=1.0))
    (tmp_path / "stock.py").write_text(STOCK_APP)
    command = [sys.executable, "-m", "celery", "-A", "stock", "-b", fleet.url, "--result-backend", fleet.url, "worker"]

    with subprocess.Popen(
        [*command, "-P", "solo", "-Q", "fake"], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    ) as worker:
        try:
            answer = fleet.client.handle("to-stock").result(60)
        finally:
            worker.terminate()

    assert answer.text == "stock hello"


def test_workers_come_back_when_the_broker_does(tmp_path, make_fleet) -> None:
    """The broker is killed and restarted with its append-only file: the worker consumes again without help."""
    from shared.embedded import EmbeddedBroker

    with EmbeddedBroker(tmp_path / "own-broker", append_only=True) as own:
        fleet = make_fleet()
        fleet.url = own.url
        worker = fleet.start_worker()
        assert fleet.client.submit(ECHO).result(10)
        own.kill()
        own.start()

        def answered() -> bool:
            try:
                return fleet.client.submit(ECHO).result(2).text == "olleh"
            except (Exception, TimeoutError):
                return False

        eventually(answered, 30, "an answer after the restart")
        assert worker.poll() is None
        fleet.stop()


def test_workers_of_one_queue_may_have_different_models(make_fleet) -> None:
    """A request reaches the worker that has its model, whoever claims it first."""
    first = make_fleet()
    second = make_fleet(models={"catalog": {"other": {"path": "fake", "kinds": ["generate"], "engines": ["fake"]}}})
    only_echo = first.start_worker()
    second.start_worker()
    eventually(lambda: len(second.client.fleet()) == 2)

    requests = [{"model": ("echo", "other")[n % 2], "inputs": {"prompt": f"{n}"}} for n in range(100)]
    results = [handle.result(20) for handle in second.client.submit_many(requests)]

    assert [result.text for result in results] == [f"{n}"[::-1] for n in range(100)]
    assert only_echo.poll() is None


def test_an_id_that_was_submitted_is_not_run_again(make_fleet, redis_client) -> None:
    """Submitted again, before or after its answer, from this client or another, an id gives that answer."""
    fleet = make_fleet()
    fields = {"id": "mine", "model": "echo", "inputs": {"prompt": "abc"}}
    first = fleet.client.submit(fields, timeout=60)
    again = fleet.client.submit(fields, timeout=60)
    with Client(settings=fleet.settings) as other:
        elsewhere = other.submit(fields, timeout=60)
        assert sum(fleet.client.queue_lengths()[queue] for queue in ("fake",)) == 1

        fleet.start_worker()

        assert {handle.result(30).text for handle in (first, again, elsewhere)} == {"cba"}
        assert other.submit(fields).result(1).text == "cba"
        assert fleet.client.queue_lengths()["fake"] == 0


def test_delayed_tasks_run_in_the_order_in_which_they_are_due(make_fleet, redis_client: redis.Redis) -> None:
    """Of any Celery app, while the worker is busy with those before them; what was sent later waits for all of them."""
    fleet = make_fleet(optimization={"fake": {"latency_ms": 15}, "batcher": {"max_batch_size": 1}})
    fleet.start_worker()
    app = bare_app(fleet.url)

    def send(number: int, **options: Any) -> str:
        request = {"model": "echo", "inputs": {"prompt": str(number)}}
        return str(app.send_task("muai.infer", kwargs={"request": request}, queue="fake", **options).id)

    ids = [send(number, countdown=1.5) for number in range(60)]
    found = [app.AsyncResult(one).get(timeout=60) and app.AsyncResult(one).date_done for one in ids]

    assert found == sorted(found)


@pytest.mark.parametrize("ours", [True, False])
def test_what_was_cancelled_and_waits_longer_than_its_result_is_kept_does_not_run(
    make_fleet, redis_client: redis.Redis, ours: bool
) -> None:
    """Our client's and a plain sender's: it has one record, and nothing of it is left."""
    fleet = make_fleet(fleet={"result_expires_seconds": 1, "on_outage": "raise"})
    idle = fleet.start_worker()
    idle.send_signal(signal.SIGSTOP)
    told: list[bytes] = []
    listener = redis_client.pubsub()
    listener.psubscribe("celery-task-meta-*")
    if ours:
        name = fleet.client.submit(ECHO).id
    else:
        name = bare_app(fleet.url).send_task("muai.infer", kwargs={"request": ECHO}, queue="fake").id
    assert fleet.client.cancel(name)
    eventually(lambda: not redis_client.exists(keys.result_key(name)), what="the end of its record")
    idle.send_signal(signal.SIGCONT)
    eventually(lambda: fleet.client.queue_lengths()["fake"] + redis_client.zcard(keys.LEASE_INDEX) == 0)

    while (message := listener.get_message(timeout=0.2)) is not None:
        told += [message["data"]] if message["type"] == "pmessage" else []
    assert [b"REVOKED" in record for record in told] == [True]
    assert redis_client.zcard(keys.CANCELLED) == 0
    assert not redis_client.exists(keys.result_key(name))
