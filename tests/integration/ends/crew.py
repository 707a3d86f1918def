"""What the tests of how requests end share: a fleet for a module, and an undertaker for messages that are to die."""

from __future__ import annotations

import base64
import gc
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import kombu.pools
import redis
import yaml
from celery import Celery

from shared import keys
from shared.embedded import EmbeddedBroker
from tests.support.fleet import FAKE, FleetUnderTest, merged
from tests.support.waiting import eventually

GRAVE = "grave"
"""A queue from which every message comes to a worker as that of one who has died over it."""

QUICK: dict[str, Any] = {
    "fleet": {
        "lease_seconds": 10.0, "sweep_seconds": 0.2, "heartbeat_seconds": 0.3, "rescue_after_seconds": 0.3,
        "max_deliveries": 1, "max_payload_bytes": 20_000, "max_result_bytes": 5_000,
    },
    "optimization": {"engine_preference": ["fake", "onnx"], "breaker": {"failures": 100_000}},
    "models": {"catalog": {"far": {"path": "fake", "kinds": ["generate"], "engines": ["onnx"]}}},
}  # fmt: skip

SLOW: dict[str, Any] = {
    "fleet": {"lease_seconds": 2.0, "sweep_seconds": 0.2, "heartbeat_seconds": 0.3},
    "optimization": {
        "batcher": {"adaptive_batching": False, "batch_timeout_ms": 1500}, "fake": {"latency_ms": 1500},
    },
}  # fmt: skip


@contextmanager
def fleet_on(
    broker: EmbeddedBroker, database: int, folder: Path, changes: dict[str, Any], **environ: str
) -> Iterator[FleetUnderTest]:
    """A fleet with one worker on an empty database of the broker."""
    url = f"{broker.url.rpartition('/')[0]}/{database}"
    kombu.pools.reset()  # what earlier tests have connected to it, others may have cut
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    config = folder / "fleet.yaml"
    config.write_text(yaml.safe_dump(merged(FAKE, changes)), encoding="utf-8")
    fleet = FleetUnderTest(url, folder, config)
    try:
        fleet.start_worker("fake,control", environ=environ)
        yield fleet
    finally:
        gc.collect()  # results that nobody has waited on tell the broker so, while it is there
        fleet.stop()


@contextmanager
def undertaker(url: str) -> Iterator[None]:
    """Leave what comes to the grave as a dead worker leaves it: leased, by nobody who lives."""
    over = threading.Event()

    def work() -> None:
        with redis.Redis.from_url(url) as client:
            number = 0
            while not over.is_set():
                found = client.brpop([GRAVE], timeout=0.2)
                if found is not None:
                    number += 1
                    client.hset(keys.LEASE_MESSAGES, f"dead-{number}", b"fake\n" + found[1])
                    client.zadd(keys.LEASE_INDEX, {f"dead-{number}": 1})

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


PAST = datetime.now(UTC) - timedelta(hours=1)


@dataclass(frozen=True)
class Bad:
    """A call that ends without a result: how it is made, and what its caller is told."""

    error: str
    says: str
    options: dict[str, Any] = field(default_factory=dict)
    state: str = "FAILURE"
    first: Callable[[FleetUnderTest, Celery, str], None] | None = None
    """What is done before it is sent, with its id."""
    then: Callable[[FleetUnderTest, Celery, str], None] | None = None
    """And after."""


def nested(levels: int) -> Any:
    """A list in a list in a list."""
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def cancel(fleet: FleetUnderTest, _: Celery, request_id: str) -> None:
    """Cancel with our own client."""
    fleet.client.cancel(request_id)


def revoke(_: FleetUnderTest, app: Celery, request_id: str) -> None:
    """Revoke as any Celery app does; a worker that connects just then has not heard it."""
    eventually(lambda: app.control.revoke(request_id, reply=True, timeout=5, limit=1), 40, "the reply of the worker")


def revoked_elsewhere(_: FleetUnderTest, app: Celery, request_id: str) -> None:
    """As workers do that have heard of it; one that starts later has not."""
    app.backend.mark_as_revoked(request_id, reason="revoked")


REVOKED = ("Cancelled|TaskRevokedError", "cancelled|revoked")

BAD = {
    "engine error": Bad("EngineError", "told to fail", {"prompt": "!fail"}),
    "crash": Bad("EngineError", "crash", {"prompt": "!crash"}),
    "refused by the engine": Bad("BadRequest", "told to refuse", {"prompt": "!bad"}),
    "refused at admission": Bad("BadRequest", "kind", {"request": {"kind": "guess"}}),
    "unknown model": Bad("UnknownModel", "nobody", {"model": "nobody"}),
    "answer too large": Bad(
        "AnswerTooLarge", "max_result_bytes", {"prompt": "x" * 9000, "request": {"params": {"max_tokens": 9000}}}
    ),
    "deadline": Bad("DeadlineExceeded", "deadline passed", {"request": {"deadline": PAST.timestamp()}}),
    "expired": Bad("Cancelled", "expired", {"expires": PAST}, "REVOKED"),
    "given up": Bad("DeadLettered", "no worker lived", {"queue": GRAVE}),
    "no engine": Bad("NoEngineAvailable", "", {"model": "far", "queue": "onnx"}),
    "expired where nobody serves": Bad("Cancelled", "expired", {"queue": "onnx", "expires": PAST}, "REVOKED"),
    "cancelled where nobody serves": Bad("Cancelled", "cancelled", {"queue": "onnx"}, "REVOKED", cancel),
    "unknown task where nobody serves": Bad("BadRequest", "no task", {"task": "else", "queue": "onnx"}),
    "unknown task": Bad("BadRequest", "no task", {"task": "somebody.else"}),
    "on the control queue": Bad("BadRequest", "queues of the engines", {"queue": "control"}),
    "too large": Bad("PayloadTooLarge", "max_payload_bytes", {"prompt": "x" * 30_000}),
    "far too large": Bad("PayloadTooLarge", "max_payload_bytes", {"prompt": "x" * 300_000}),
    "compressed": Bad("UndecodableMessage", "compressed", {"compression": "gzip"}),
    "deep headers": Bad("UndecodableMessage", "deep", {"headers": {"x": nested(40)}}),
    "large headers": Bad(
        "UndecodableMessage|PayloadTooLarge", "headers are more|max_payload", {"headers": {"x": "y" * 90_000}}
    ),
    "cancelled before": Bad("Cancelled", "cancelled", {}, "REVOKED", cancel),
    "revoked before": Bad(*REVOKED, {}, "REVOKED", revoke),
    "revoked elsewhere": Bad(*REVOKED, {}, "REVOKED", revoked_elsewhere),
    "cancelled while delayed": Bad("Cancelled", "cancelled", {"countdown": 600}, "REVOKED", None, cancel),
    "revoked while delayed": Bad(*REVOKED, {"countdown": 600}, "REVOKED", None, revoke),
}
"""Every way to end without a result, as far as it needs no slow engine."""


def infer(app: Celery, prompt: str | None = "hello", *, model: str = "echo", **options: Any) -> Any:
    """A call of ``muai.infer``; without a prompt it works on the answer of the step before it."""
    request = options.pop("request", {})
    inputs = {} if prompt is None else {"inputs": {"prompt": prompt}}
    name = options.pop("task", "muai.infer")
    call = {"request": {"model": model, **inputs, **request}}
    return app.signature(name, kwargs=call, **{"queue": "fake", **options})


def calls_on(client: redis.Redis, queue: str) -> list[dict[str, Any]]:
    """The keyword arguments of the calls that wait on a queue of nobody's."""
    found = []
    for message in client.lrange(queue, 0, -1):
        body = base64.b64decode(json.loads(message)["body"])
        found.append(json.loads(body)[1])
    return found


def left_behind(client: redis.Redis) -> dict[str, Any]:
    """What the broker still knows of requests that are under way."""
    found: dict[str, Any] = {
        keys.LEASE_INDEX: client.zrange(keys.LEASE_INDEX, 0, 4),
        keys.LEASE_MESSAGES: client.hkeys(keys.LEASE_MESSAGES)[:5],
        keys.UNDER_WAY: client.zrange(keys.UNDER_WAY, 0, 4),
        keys.DELAYED: client.hkeys(keys.DELAYED)[:5],
        keys.IN_FLIGHT: client.hgetall(keys.IN_FLIGHT),
        "running": list(client.scan_iter("muai:running:*", count=10_000))[:5],
        **{queue: client.lrange(queue, 0, 0) for queue in ("fake", "onnx", "control", GRAVE)},
    }
    return {name: value for name, value in found.items() if value}
