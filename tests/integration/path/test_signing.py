"""A fleet with a signing key runs what was signed with it, and nothing else."""

from __future__ import annotations

import json

import orjson
import pytest
from pydantic import SecretStr

from producer import Client
from shared import keys, wire
from shared.contract import InferenceRequest
from shared.errors import WrongSignature
from shared.settings_loader import load_settings
from shared.signing import Signer
from tests.support.requests import ECHO, bare_app
from tests.support.waiting import eventually

KEY, OTHER = "the key of this very fleet", "the key of somebody else"


def test_only_signed_messages_run(make_fleet, redis_client) -> None:
    """Signed requests are answered, over a killed worker too; others become dead letters and their senders are told."""
    fleet = make_fleet(fleet={"lease_seconds": 1.0, "sweep_seconds": 0.2}, optimization={"fake": {"latency_ms": 700}})
    environ = {"MUAI_FLEET_SIGNING_KEY": KEY}

    def client(key: str) -> Client:
        return Client(settings=load_settings(fleet.config, {"REDIS_URL": fleet.url, "MUAI_FLEET_SIGNING_KEY": key}))

    doomed = fleet.start_worker(environ=environ)
    with client(KEY) as trusted, client(OTHER) as stranger:
        handle = trusted.submit(ECHO)
        eventually(lambda: redis_client.zcard(keys.LEASE_INDEX) == 1, what="the claim")
        doomed.kill()
        fleet.start_worker(environ=environ)
        assert handle.result(30).text == "olleh"

        with pytest.raises(WrongSignature, match="another key"):
            stranger.submit(ECHO).result(10)
        plain = bare_app(fleet.url).send_task("muai.infer", kwargs={"request": ECHO}, queue="fake")
        with pytest.raises(Exception, match="not signed"):
            plain.get(timeout=10)
        assert redis_client.xlen(keys.DEAD_LETTERS) == 2
        log = fleet.log(fleet.processes[-1])
        assert KEY not in log
        assert "the message is not signed" in log


def test_a_worker_signs_what_it_sends_on(make_fleet, redis_client) -> None:
    """The next step of a chain is published by the worker, with its signature."""
    fleet = make_fleet()
    fleet.start_worker(environ={"MUAI_FLEET_SIGNING_KEY": KEY})
    step = bare_app(fleet.url).signature(
        "muai.infer", kwargs={"request": {"model": "echo"}}, queue="fake", task_id="the-second-step"
    )
    envelope = json.loads(wire.encode_request(InferenceRequest.parse(ECHO), "fake", sent=0.0))
    args, kwargs, embed = json.loads(envelope["body"])
    envelope["body"] = json.dumps([args, kwargs, {**embed, "chain": [dict(step)]}])
    envelope["headers"]["muai"] = Signer(SecretStr(KEY)).sign(envelope["headers"], envelope["body"])

    redis_client.lpush("fake", orjson.dumps(envelope))

    assert fleet.client.handle("the-second-step").result(10).text == "hello"
