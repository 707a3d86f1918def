"""More than the fleet can take: queues have bounds, senders are told when to come back, nobody is starved."""

from __future__ import annotations

import signal

import pytest
from celery import Celery, chain

from producer import InferenceResult
from shared import keys
from shared.errors import BrokerFull, DeadlineExceeded, FleetError, QueueFull, QuotaExceeded
from tests.support.requests import ECHO, bare_app
from tests.support.waiting import eventually


# Requirements: 8.3
def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(make_fleet) -> None:
    """Past the capacity a submit is refused whole; the wait it is told fits the rate at which the queue empties."""
    fleet = make_fleet(
        fleet={"queue_capacity": 60}, optimization={"fake": {"latency_ms": 100}, "batcher": {"max_batch_size": 5}}
    )
    fleet.start_worker()
    handles = [handle for _ in range(6) for handle in fleet.client.submit_many([ECHO] * 10)]
    eventually(lambda: fleet.client.queue_lengths()["fake"] <= 20, what="a queue that empties")
    handles += fleet.client.submit_many([ECHO] * 40)

    with pytest.raises(QueueFull) as refused:
        fleet.client.submit_many([ECHO] * 30)

    assert 0.02 < refused.value.retry_after < 10  # 50 a second leave it at most, and some 10 to 20 places are missing
    assert fleet.client.queue_lengths()["fake"] <= 60
    assert all(isinstance(handle.outcome(20), InferenceResult) for handle in handles)


def test_a_file_of_requests_waits_for_room(make_fleet) -> None:
    """``map`` over more than the queue holds loses nothing and fails nothing, also with room for less than a chunk."""
    fleet = make_fleet(fleet={"queue_capacity": 7}, optimization={"fake": {"latency_ms": 5}})
    fleet.start_worker()

    texts = [result.text for result in fleet.client.map({**ECHO, "inputs": {"prompt": f"{n}"}} for n in range(50))]

    assert texts == [str(number)[::-1] for number in range(50)]


def test_a_bad_line_among_many_costs_no_other_its_answer_while_the_queue_is_full(make_fleet) -> None:
    """Where a chunk is taken apart because of one member, its others wait for room like any."""
    fleet = make_fleet(fleet={"queue_capacity": 3}, optimization={"fake": {"latency_ms": 5}})
    fleet.start_worker()
    requests = [{**ECHO, "model": "nobody" if number == 17 else "echo"} for number in range(60)]

    outcomes = list(fleet.client.map(requests, errors="yield"))

    failed = [number for number, outcome in enumerate(outcomes) if isinstance(outcome, FleetError)]
    assert failed == [17]


def test_a_tenant_is_held_to_its_rate(make_fleet) -> None:
    """Past its burst a tenant is refused with the time after which it may submit; others are not."""
    fleet = make_fleet(fleet={"tenants": {"acme": {"requests_per_second": 10, "burst": 5}}})
    fleet.start_worker()
    acme = {**ECHO, "tenant": "acme"}
    fleet.client.submit_many([acme] * 5)

    with pytest.raises(QuotaExceeded) as refused:
        fleet.client.submit(acme)

    assert 0 < refused.value.retry_after <= 0.1
    assert fleet.client.submit(ECHO).result(10)
    eventually(lambda: taken(fleet.client, acme), what="a token")


def taken(client, request) -> bool:
    """Whether the fleet takes it."""
    try:
        return client.submit(request).result(10) is not None
    except QuotaExceeded:
        return False


def test_the_spec_s_name_for_the_capacity_counts_where_it_is_set(make_fleet) -> None:
    """``monitoring.server.queue_capacity`` is the bound where somebody sets it."""
    fleet = make_fleet({"monitoring": {"server": {"queue_capacity": 3}}})
    fleet.start_worker("fake")
    fleet.client.fleet()
    fleet.processes[0].terminate()
    fleet.processes[0].wait(30)

    fleet.client.submit_many([ECHO] * 3, timeout=30)
    with pytest.raises(QueueFull):
        fleet.client.submit(ECHO, timeout=30)


def test_a_deadline_that_cannot_be_met_costs_the_engine_nothing(make_fleet) -> None:
    """Once it is known how long such requests take, one with less time left is told so while it waits."""
    fleet = make_fleet(optimization={"fake": {"latency_ms": 2500}})
    fleet.start_worker()
    for _ in range(3):
        fleet.client.submit(ECHO).result(30)

    outcome = fleet.client.submit(ECHO, timeout=2.0).outcome(30)

    assert isinstance(outcome, DeadlineExceeded)
    assert "cannot be met" in outcome.message  # which is said before the deadline; what is said after it is another


def test_a_model_that_is_loaded_for_the_first_batch_refuses_nobody(make_fleet) -> None:
    """Loading is not run time, neither in what a worker learns of it nor in what it says of a batch."""
    fleet = make_fleet(optimization={"fake": {"load_ms": 3000}})
    fleet.start_worker()
    first = fleet.client.submit(ECHO).result(30)

    outcomes = [fleet.client.submit(ECHO, timeout=1.5).outcome(10) for _ in range(5)]

    assert all(isinstance(outcome, InferenceResult) for outcome in outcomes)
    assert first.metadata["timing"]["engine_ms"] < 1000 < first.latency_ms


def test_an_id_that_others_send_twice_runs_once_at_a_time(make_fleet, redis_client) -> None:
    """A plain Celery app sends the same id several times, while it runs and after: one run, one result for all."""
    fleet = make_fleet(optimization={"fake": {"latency_ms": 700}})
    worker = fleet.start_worker()
    app = Celery("plain", broker=fleet.url, backend=fleet.url)
    send = {"kwargs": {"request": ECHO}, "queue": "fake", "task_id": "same"}
    results = [app.send_task("muai.infer", **send)]
    eventually(lambda: redis_client.zcard(keys.LEASE_INDEX), what="the first to run")
    results += [app.send_task("muai.infer", **send) for _ in range(3)]

    assert len({str(result.get(timeout=20)) for result in results}) == 1
    app.send_task("muai.infer", **send)
    eventually(lambda: sum(fleet.client.queue_lengths().values()) == 0, what="the end of all copies")

    assert fleet.client.submit({**ECHO, "id": "same"}).result(5)
    (stats,) = app.control.inspect(timeout=5).stats().values()
    assert stats["total"] == {"muai.infer": 1}
    assert worker.poll() is None


def test_a_flood_costs_others_nothing(make_fleet) -> None:
    """While one tenant has hundreds waiting, another's requests are answered at once, and low priority moves on."""
    fleet = make_fleet(
        optimization={"fake": {"latency_ms": 20}, "batcher": {"max_batch_size": 4}}, fleet={"starvation_limit": 5}
    )
    fleet.start_worker()
    flood = fleet.client.submit_many([{**ECHO, "tenant": "flood", "priority": "high"}] * 600)
    low = fleet.client.submit_many([{**ECHO, "tenant": "flood", "priority": "low"}] * 20)

    small = [waited_ms(fleet.client.submit({**ECHO, "tenant": "small", "priority": "high"})) for _ in range(10)]

    flooding = [waited_ms(handle) for handle in flood]
    assert max(small) < max(flooding) / 4
    assert sum(waited > max(map(waited_ms, low)) for waited in flooding) > 100, "each low one before the last high ones"


def waited_ms(handle) -> float:
    """How long a request was in its queue, by the worker's clock."""
    return float(handle.result(60).metadata["timing"]["queued_ms"])


def test_a_full_broker_refuses_requests_and_is_emptied_all_the_same(make_fleet, redis_client) -> None:
    """Out of memory, the broker takes no request; what waits is claimed, kept, answered and cancelled nevertheless."""
    fleet = make_fleet(fleet={"lease_seconds": 1}, optimization={"fake": {"latency_ms": 1500}})
    worker = fleet.start_worker()
    handles = fleet.client.submit_many(
        [{**ECHO, "tenant": tenant} for tenant in ("default", "acme") for _ in range(40)]
    )
    last = fleet.client.submit({**ECHO, "priority": "low"})
    redis_client.config_set("maxmemory", 1)
    try:
        with pytest.raises(BrokerFull):
            fleet.client.submit(ECHO)
        assert last.cancel()
        assert all(isinstance(handle.outcome(30), InferenceResult) for handle in handles)
        assert {handle.outcome(1).metadata["worker"] for handle in handles} == {fleet.client.fleet()[0].id}
    finally:
        redis_client.config_set("maxmemory", 0)
    assert eventually(lambda: fleet.client.submit(ECHO), what="room").result(20)
    assert worker.poll() is None
    assert "taken over" not in fleet.log(worker)


def test_a_large_request_holds_up_no_small_one(make_fleet) -> None:
    """It runs in parts, with others between, and is answered as one."""
    fleet = make_fleet(optimization={"fake": {"per_item_ms": 10}, "batcher": {"max_batch_size": 8}})
    fleet.start_worker()
    texts = [f"text {number}" for number in range(400)]
    large = fleet.client.submit({"model": "echo", "kind": "embed", "inputs": {"texts": texts}})
    eventually(lambda: fleet.client.queue_lengths()["fake"] == 0, what="the large one to be claimed")

    small = [fleet.client.submit(request) for request in (ECHO, {**ECHO, "kind": "embed", "inputs": {"texts": ["a"]}})]
    assert all(isinstance(handle.outcome(20), InferenceResult) for handle in small)
    with pytest.raises(TimeoutError):
        large.outcome(0)

    result = large.result(60)
    alone = [fleet.client.submit({"model": "echo", "kind": "embed", "inputs": {"texts": [text]}}) for text in texts[:3]]
    assert result.outputs["embeddings"][:3] == [handle.result(20).outputs["embeddings"][0] for handle in alone]
    assert len(result.outputs["embeddings"]) == 400


def test_a_tenant_at_its_share_keeps_no_idle_worker_busy(make_fleet, redis_client) -> None:
    """What is held back is looked at when something has ended, not all the time; then it starts."""
    fleet = make_fleet(
        fleet={"tenants": {"*": {"in_flight_share": 0.01}}},
        optimization={"fake": {"latency_ms": 120_000}, "batcher": {"max_batch_size": 8}},
        monitoring={"server": {"graceful_shutdown_timeout": 0}},
    )
    workers = [fleet.start_worker() for _ in range(3)]
    first = fleet.client.submit({**ECHO, "tenant": "t0"})
    eventually(lambda: redis_client.hvals(keys.IN_FLIGHT) == [b"1"], what="the first")
    fleet.client.submit_many({**ECHO, "tenant": f"t{number % 6}"} for number in range(40))
    eventually(lambda: len(redis_client.hvals(keys.IN_FLIGHT)) == 6, what="one of each tenant in flight")

    looks = []

    def commands() -> tuple[int, int]:
        seconds, micros = redis_client.time()
        looks.append(redis_client.info("stats")["total_commands_processed"])
        return looks[-1] - 2 * len(looks), seconds * 1_000_000 + micros  # without the test's own two

    before, since = commands()
    eventually(lambda: commands()[1] > since + 4_000_000)
    after, until = commands()
    assert (after - before) / (until - since) * 1_000_000 < 50 * len(workers)
    assert fleet.client.queue_lengths()["fake"] == 35
    assert fleet.client.cancel(first.id)
    eventually(lambda: fleet.client.queue_lengths()["fake"] == 34, what="the start of the tenant's next request")


def test_a_success_whose_chain_cannot_go_on_yet_holds_up_no_other(make_fleet, redis_client) -> None:
    """On a full broker: those without a chain are answered and make room, then the chains go on, each step once."""
    fleet = make_fleet(optimization={"batcher": {"max_batch_size": 4}})
    worker = fleet.start_worker()
    fleet.client.submit(ECHO).result(10)
    worker.send_signal(signal.SIGSTOP)
    app = bare_app(fleet.url)
    step = app.signature("muai.infer", kwargs={"request": ECHO}, queue="fake")
    chains = [chain(step, step.clone())() for _ in range(4)]
    handles = fleet.client.submit_many([ECHO] * 40)
    chains += [chain(step, step.clone())() for _ in range(4)]
    redis_client.config_set("maxmemory", 1)
    redis_client.config_set("maxmemory-policy", "noeviction")
    try:
        worker.send_signal(signal.SIGCONT)
        assert [handle.result(30).text for handle in handles] == ["olleh"] * 40
        assert not any(redis_client.exists(keys.result_key(last.id)) for last in chains)
        assert not any(redis_client.exists(keys.result_key(last.parent.id)) for last in chains)
        assert "cannot be told yet" in fleet.log(worker)
    finally:
        redis_client.config_set("maxmemory", 0)

    assert [last.get(timeout=30)["outputs"]["text"] for last in chains] == ["olleh"] * 8
    assert [last.parent.state for last in chains] == ["SUCCESS"] * 8
    assert fleet.client.queue_lengths()["leased"] == 0
