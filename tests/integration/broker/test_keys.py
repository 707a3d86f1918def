"""What the fleet keeps in the broker has bounds, and is in the table of ``docs/keys.md``."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta

import redis
from celery import chain, chord, group

from shared import keys, wire
from shared.contract import InferenceRequest
from shared.errors import FleetError
from tests.support.fleet import ROOT
from tests.support.requests import ECHO, bare_app
from tests.support.waiting import eventually
from workers.broker.delivery import RedisDelivery, Settlement

RESULT_SECONDS = 3
DEAD_BYTES = 200_000

BY_THEMSELVES = (keys.result_key(""), "celery-taskset-meta-", keys.REPLY_PREFIX, "muai:running:", "muai:rate:",
                 "muai:parity:", keys.RELEASED, keys.LOOKED, keys.SWEEPING, keys.DOUBTED, keys.DOUBTING,
                 keys.CANCELLED)  # fmt: skip
"""Keys that begin so expire."""

STAY = (keys.DEAD_LETTERS, keys.SEAL, keys.LEASE_COUNTER, keys.CANCELLED, "muai:workers:", "muai:queue:", "_kombu.",
        "muai:parity:", "muai:rate:", keys.RELEASED, keys.SWEEPING)  # fmt: skip
"""Keys that begin so may be there when all has ended and was forgotten."""


def patterns() -> list[re.Pattern[str]]:
    """The keys of the table."""
    text = (ROOT / "docs/keys.md").read_text(encoding="utf-8")
    names = re.findall(r"^\| `([^`]+)` \| (?:string|list|zset|hash|stream|any) \|", text, re.MULTILINE)
    lists = "(?:" + "|".join(["onnx", "pytorch", "vllm", "deepspeed", "fake", "control"]) + ")(?:\x06\x16[369])?"
    queue = r"[\w.-]+"
    found = []
    for name in names:
        made = re.sub(r"<(\w+)>", lambda part: {"list": lists, "queue": queue}.get(part[1], ".+"), name)
        found.append(re.compile(made))
    return found


class Watch:
    """Looks at all keys again and again."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self.seen: set[str] = set()
        self.for_ever: set[str] = set()

    def look(self) -> None:
        for key in self._client.keys("*"):
            name = key.decode()
            self.seen.add(name)
            if name.startswith(BY_THEMSELVES) and self._client.ttl(key) == -1:
                self.for_ever.add(name)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While something goes on."""
        over = threading.Event()

        def work() -> None:
            while not over.wait(0.05):
                self.look()

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def test_whatever_is_done_to_a_fleet_all_that_it_keeps_has_a_bound(make_fleet, redis_client: redis.Redis) -> None:
    """Every kind of caller, and workers that die: each key is in the table, and in the end nothing is left of them."""
    fleet = make_fleet(
        fleet={
            "result_expires_seconds": RESULT_SECONDS, "lease_seconds": 1.0, "sweep_seconds": 0.2, "max_deliveries": 2,
            "heartbeat_seconds": 0.3, "rescue_after_seconds": 0.3, "dead_letter_capacity_bytes": DEAD_BYTES,
            "tenants": {"acme": {"requests_per_second": 1000, "in_flight_share": 0.5}},
        },
        optimization={"fake": {"latency_ms": 20}, "batcher": {"max_batch_size": 8}},
    )  # fmt: skip
    fleet.start_worker("fake,control")
    victim = fleet.start_worker()
    app = bare_app(fleet.url)
    watch = Watch(redis.Redis.from_url(fleet.url))
    with watch.watching():
        client = fleet.client
        for tenant in ("default", "acme"):
            client.submit_many([{**ECHO, "tenant": tenant, "priority": ("low", "high")[n % 2]} for n in range(40)])
        for prompt in ("!fail", "!bad", "!crash", "!busy once"):
            client.submit(model="echo", inputs={"prompt": prompt})
        client.submit({**ECHO, "id": "twice"})
        client.submit({**ECHO, "id": "twice"})
        for handle in client.submit_many([{**ECHO, "priority": "low"}] * 5):
            handle.cancel()
        client.cancel("nobody")
        step = app.signature("muai.infer", kwargs={"request": ECHO}, queue="fake")
        chain(step, step.clone())()
        chord(group(step.clone() for _ in range(3)), step.clone())()
        failing = app.signature("muai.infer", kwargs={"request": {**ECHO, "model": "nobody"}}, queue="fake")
        chain(failing, step.clone())()
        for options in ({}, {"task_id": "same"}, {"task_id": "same"}, {"countdown": 1}, {"queue": "onnx"},
                        {"expires": datetime.now(UTC) - timedelta(hours=1)}, {"ignore_result": True}):  # fmt: skip
            app.send_task("muai.infer", kwargs={"request": ECHO}, **{"queue": "fake", **options})
        app.send_task("somebody.else", queue="fake")
        app.send_task("muai.infer", args=[1], queue="control")
        redis_client.lpush("fake", b"no JSON", *(b"x" * 50_000 for _ in range(20)))
        nameless = json.loads(wire.encode_request(InferenceRequest.parse(ECHO), "fake", sent=0.0))
        nameless["headers"] |= {"id": None, "muai": {}}
        nameless["properties"]["correlation_id"] = None
        redis_client.lpush("fake", *[json.dumps(nameless)] * 5)
        victim.kill()
        client.submit_many([ECHO] * 40)
        app.control.inspect(timeout=0.5).ping()
        with suppress(FleetError):
            client.submit({**ECHO, "id": "twice", "inputs": {"prompt": "else"}})

        def quiet() -> bool:
            lengths = client.queue_lengths()
            return sum(lengths.values()) == lengths["dead"]

        eventually(quiet, what="the end of all")
    assert redis_client.memory_usage(keys.DEAD_LETTERS, samples=0) <= DEAD_BYTES
    for name in (keys.UNDER_WAY, keys.CONTENTS, keys.DELAYED, keys.IN_FLIGHT, keys.LEASE_INDEX, keys.LEASE_MESSAGES):
        assert not redis_client.exists(name), (name, redis_client.execute_command("DUMP", name))
    assert not redis_client.keys("muai:running:*")
    assert not watch.for_ever
    table = patterns()
    assert not [name for name in watch.seen if not any(pattern.fullmatch(name) for pattern in table)]

    fleet.stack.close()  # the client goes, and with it its stream
    with suppress(AssertionError):
        eventually(lambda: not left_in(redis_client), 20, "the end of what goes by itself")
    assert left_in(redis_client) == []


def left_in(client: redis.Redis) -> list[str]:
    """Keys that should be gone by now, and do not go by themselves."""
    names = [key.decode() for key in client.keys("*") if client.ttl(key) == -1]
    return [name for name in names if not name.startswith(STAY) and not name.endswith("pidbox")]


def test_dead_letters_are_bounded_by_bytes(redis_client: redis.Redis, make_fleet) -> None:
    """The oldest go; the last one stays, however large it is."""
    fleet = make_fleet(fleet={"dead_letter_capacity_bytes": DEAD_BYTES})
    delivery = RedisDelivery(redis_client, fleet.settings.fleet)

    def bury(number: int, size: int) -> None:
        redis_client.lpush("fake", b"%d:" % number + b"x" * size)
        (message,) = delivery.claim("fake", 1).messages
        delivery.settle([Settlement(message.lease, dead_reason="given up")])

    for number in range(40):
        bury(number, 10_000)
    kept = [int(fields[b"message"].partition(b":")[0]) for _, fields in redis_client.xrange(keys.DEAD_LETTERS)]
    assert redis_client.memory_usage(keys.DEAD_LETTERS, samples=0) <= DEAD_BYTES
    assert kept == list(range(kept[0], 40))
    assert len(kept) > 8

    bury(40, 2 * DEAD_BYTES)
    ((_, fields),) = redis_client.xrange(keys.DEAD_LETTERS)
    assert fields[b"message"].startswith(b"40:")
