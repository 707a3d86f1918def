"""What an earlier release left in the broker, and on disk, is read by this one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from pydantic import SecretStr

from producer import Client, InferenceResult, RequestStatus
from producer.client.records import decode_record, outcome_of
from shared import errors, keys, wire
from shared.contract import EngineName, InferenceRequest, Kind
from shared.registry import EngineInfo, ServedModel, WorkerInfo, WorkerRegistry
from shared.signing import Signer
from tests.compatibility import RELEASES, records_in, restore
from tests.compatibility import read_json as read
from tests.support.fleet import ROOT, FleetUnderTest
from tests.support.requests import bare_app
from tests.support.waiting import eventually

SIGNING_KEY = "the signing key of the recorded fleet"

SETTINGS: dict[str, Any] = {
    "optimization": {"engine_preference": ["fake", "onnx"], "batcher": {"max_batch_size": 4}},
    "fleet": {"lease_seconds": 2.0, "sweep_seconds": 0.3, "heartbeat_seconds": 30.0, "max_deliveries": 2},
    "models": {
        "catalog": {
            "echo": {"kinds": [kind.value for kind in Kind]},
            "two": {"path": "fake", "kinds": ["generate"], "engines": ["fake", "onnx"]},
        }
    },
}
"""Those with which the files were recorded, but that workers may be silent for two minutes."""

OTHER_WORKER = WorkerInfo(
    id="onnx", host="h", pid=1, started=1.0, queues=("onnx",),
    engines=(EngineInfo(name=EngineName.ONNX, models={"two": ServedModel(kinds=(Kind.GENERATE,))}),),
)  # fmt: skip

pytestmark = pytest.mark.parametrize("release", RELEASES, ids=lambda path: path.name)


def heard_again(client: redis.Redis) -> None:
    """Let the workers whose announcements are there have made them just now."""
    now = time.time() * 1000
    client.zadd(keys.WORKERS_SEEN, {worker.decode(): now for worker in client.hkeys(keys.WORKERS_INFO)})


def told(record: dict[str, Any]) -> tuple[str, Any]:
    """What a record says to whoever asked: the status, and the answer or the name of the error."""
    result = record["result"]
    if record["status"] != "SUCCESS":
        return record["status"], result["exc_type"]
    outputs = result["outputs"]
    if record["task_id"] == "chord-body":  # its inputs come in the order in which they were answered
        outputs = {**outputs, "text": sorted(outputs["text"].split("\n"))}
    return record["status"], outputs


@pytest.mark.parametrize("step", ["waiting", "leased", "redelivered"])
def test_requests_end_as_they_did(
    make_fleet: Callable[..., FleetUnderTest], redis_client: redis.Redis, release: Path, step: str
) -> None:
    """Messages that wait, that dead workers hold, that are delayed and that were delivered before: each ends alike."""
    restore(redis_client, read(release / f"{step}.json"))
    before = records_in(read(release / "ended.json"))
    lives = WorkerRegistry(redis_client, 600)
    lives.announce(OTHER_WORKER)
    make_fleet(**SETTINGS).start_worker()

    def ended() -> bool:
        lives.announce(OTHER_WORKER)
        there = redis_client.exists(*map(keys.result_key, before))
        return there == len(before) and not redis_client.zcard(keys.LEASE_INDEX)

    eventually(ended, 120, "all ends")

    after = {task: json.loads(redis_client.get(keys.result_key(task))) for task in before}
    if step != "redelivered":  # that worker was killed only once
        assert told(after.pop("second")) == ("SUCCESS", {"text": "dnoces", "token_ids": [], "finish_reason": "stop"})
        del before["second"]
    assert {task: told(record) for task, record in after.items()} == {
        task: told(record) for task, record in before.items()
    }
    # What came since is the digest of what was asked; whoever read records before takes no notice of it.
    assert {task: set(record) - {"content"} for task, record in after.items()} == {
        task: set(record) for task, record in before.items()
    }
    assert not redis_client.exists(*keys.lists_of("fake"))


def test_a_message_with_a_hop_is_read_with_its_history(
    make_fleet: Callable[..., FleetUnderTest], redis_client: redis.Redis, release: Path
) -> None:
    """The engine that failed before is named in the error."""
    state = read(release / "ended.json")
    (message,) = [text for text in state[keys.list_of("onnx", 3)]["value"] if '"hops"' in text]
    redis_client.lpush("fake", message)
    fleet = make_fleet(**SETTINGS)
    fleet.start_worker()

    with pytest.raises(errors.EngineError) as caught:
        fleet.client.handle("hop").result(20)

    assert str(caught.value).count("fake: the fake engine was told to fail") == 2


def test_results_are_read(make_fleet: Callable[..., FleetUnderTest], redis_client: redis.Redis, release: Path) -> None:
    """By the client, as a status, a result or an error of its class; and by Celery."""
    state = read(release / "ended.json")
    restore(redis_client, state)
    fleet = make_fleet()
    client, app = fleet.client, bare_app(fleet.url)
    status = {
        "SUCCESS": RequestStatus.SUCCEEDED,
        "FAILURE": RequestStatus.FAILED,
        "REVOKED": RequestStatus.CANCELLED,
        "RETRY": RequestStatus.RETRYING,
    }

    for task, record in records_in(state).items():
        outcome = client.recover(task)

        assert client.status(task) is status[record["status"]]
        assert app.AsyncResult(task).state == record["status"]
        if record["status"] == "SUCCESS":
            assert isinstance(outcome, InferenceResult)
            assert outcome.model_dump(mode="json") == record["result"]
        elif record["status"] == "RETRY":
            assert outcome is None
        else:
            assert type(outcome) is getattr(errors, record["result"]["exc_type"])
            assert str(outcome) == record["result"]["exc_message"][0]


def test_replies_are_read(release: Path) -> None:
    """Each entry of a reply stream is a record with an end."""
    state = read(release / "ended.json")
    (stream,) = [held["value"] for key, held in state.items() if key.startswith(keys.REPLY_PREFIX)]

    ends = [outcome_of(decode_record(fields["m"])) for _, fields in stream]

    assert len(ends) > 10
    assert None not in ends


def test_announcements_are_read(
    make_fleet: Callable[..., FleetUnderTest], redis_client: redis.Redis, release: Path
) -> None:
    """Workers of the release are listed with what they serve, and requests are submitted to them."""
    restore(redis_client, read(release / "ended.json"))
    heard_again(redis_client)
    client = make_fleet(**SETTINGS).client

    workers = client.fleet()

    assert any(worker.serves(EngineName.FAKE, "echo", kind) for worker in workers for kind in [Kind.EMBED])
    assert client.submit(model="echo", inputs={"prompt": "x"}).status() is RequestStatus.PENDING
    assert client.queue_lengths()["fake"] == 1


def test_dead_letters_are_shown_and_replayed(
    make_fleet: Callable[..., FleetUnderTest], redis_client: redis.Redis, release: Path
) -> None:
    """``muai dead`` lists them with their reasons; put back, a request is on its list again with a fresh count."""
    restore(redis_client, read(release / "ended.json"))
    fleet = make_fleet(**SETTINGS)

    done = subprocess.run(
        [sys.executable, "-m", "producer.cli", "dead", "list", "--json"], cwd=ROOT,
        env={**os.environ, **fleet.environ}, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    request, rubbish = [json.loads(line) for line in done.stdout.splitlines()]

    assert (request["request"], request["queue"], request["deliveries"]) == ("second", "fake", 1)
    assert "delivered 2 times" in request["reason"]
    assert "not JSON" in rubbish["reason"]
    letters = fleet.client.dead_letters()
    assert letters.replay(letters.find(["second"])) == 1
    (message,) = redis_client.lrange("fake", 0, -1)
    assert wire.own_header(wire.decode_envelope(message)["headers"])["deliveries"] == 0


def test_a_spool_is_delivered(
    make_fleet: Callable[..., FleetUnderTest], redis_client: redis.Redis, tmp_path: Path, release: Path
) -> None:
    """The next client with the file submits what is in it, each request as it was."""
    restore(redis_client, read(release / "ended.json"))
    heard_again(redis_client)
    shutil.copy(release / "spool.db", tmp_path / "spool.db")
    settings = make_fleet(**{**SETTINGS, "fleet": {**SETTINGS["fleet"], "spool_path": str(tmp_path / "spool.db")}})

    with Client(settings=settings.settings, on_outage="spool") as client:
        eventually(lambda: client.queue_lengths()["fake"] == 2, 20, "the delivery")

    waiting = [
        *redis_client.lrange(keys.list_of("fake", 6), 0, -1),
        *redis_client.lrange(keys.list_of("fake", 3), 0, -1),
    ]
    requests = [
        InferenceRequest.parse(json.loads(wire.decode_envelope(message)["body"])[1]["request"]) for message in waiting
    ]
    assert [(request.id, request.inputs.prompt) for request in requests] == [
        ("spooled-1", "spooled"),
        ("spooled-2", "\u732b"),
    ]


def test_signatures_hold(release: Path) -> None:
    """A message that was signed is accepted with the same key, and with no other."""
    (message,) = read(release / "signed.json")[keys.list_of("fake", 3)]["value"]
    envelope = wire.decode_envelope(message.encode())

    Signer(SecretStr(SIGNING_KEY)).check(envelope)

    with pytest.raises(errors.WrongSignature):
        Signer(SecretStr(f"not {SIGNING_KEY}")).check(envelope)
