"""The broker: does it answer, does it keep what it is given, is it near, who is there."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import redis

from shared import keys
from shared.broker import connect
from shared.broker_checks import check_clock, check_eviction, check_persistence, check_version
from shared.broker_url import read_url
from shared.clock import BrokerClock
from shared.errors import FleetError
from shared.findings import Finding, Grade
from shared.gpus import GpuBoard, read_gpus
from shared.masking import masked_url
from shared.registry import WorkerInfo, WorkerRegistry
from shared.settings import Settings
from shared.strays import stray_lists
from shared.tls import unchecked
from shared.weights import differences

SLOW_BROKER_MS = 5.0
MOST_KEYS = 2_000_000
"""Keys of the broker that are looked at for lists that nobody reads: a second or two of work."""


def check_broker(settings: Settings) -> Iterator[Finding]:
    """Whether the broker answers, keeps what it is given, and is near; then who is connected to it."""
    url = masked_url(settings.fleet.redis_url)
    try:
        client = connect(settings.fleet)
    except FleetError as error:
        yield Finding(Grade.FAIL, "broker", error.message, "correct fleet.redis_url or REDIS_URL")
        return
    try:
        info: Any = client.info()
        latency = statistics.median(_ping_ms(client) for _ in range(20))
        yield check_version(info, url)
        yield from check_tls(settings)
        yield check_persistence(info)
        yield check_eviction(info)
        yield check_latency(latency)
        clock = BrokerClock()
        workers = WorkerRegistry(client, settings.fleet.silent_after_seconds, clock).live()
        yield check_clock(clock.ahead)
        yield check_workers(workers, settings)
        yield from check_chains(workers, settings)
        yield from check_weights(workers)
        yield from check_parity(workers)
        yield check_gpu_leases(read_gpus(client))
        yield from check_strays(client)
    except (redis.RedisError, OSError) as error:
        reason = str(error).splitlines()[0]
        yield Finding(Grade.FAIL, "broker", f"{url} does not answer: {reason}", _remedy(reason))
    finally:
        client.close()


def _remedy(reason: str) -> str:
    if "certificate" in reason.lower():
        return "set fleet.tls_ca_file to the certificate of the authority that signed the broker's"
    if "WRONG_VERSION_NUMBER" in reason:
        return "the broker does not speak TLS on this port: redis:// instead of rediss://, or its TLS port"
    if "password" in reason.lower() or "NOAUTH" in reason:
        return "put the broker's user and password into REDIS_URL: redis://user:password@host:port/0"
    return "muai broker  (starts an embedded one), or start a Redis and set REDIS_URL"


def check_tls(settings: Settings) -> Iterator[Finding]:
    """Whether what travels to the broker is encrypted, and to whom."""
    fleet = settings.fleet
    address = read_url(fleet.redis_url)
    if address.scheme == "rediss":
        if unchecked(fleet):
            yield Finding(
                Grade.WARN, "tls", "encrypted, but the broker's certificate is not checked",
                "set fleet.tls_ca_file, and fleet.tls_verify to true",
            )  # fmt: skip
        else:
            yield Finding(Grade.OK, "tls", "encrypted, the broker's certificate is checked")
    elif not address.is_local:
        yield Finding(
            Grade.WARN, "tls", "requests and answers travel in the clear", "use rediss://; see docs/security.md"
        )


def _ping_ms(client: redis.Redis) -> float:
    started = time.perf_counter()
    client.ping()
    return (time.perf_counter() - started) * 1000


def check_latency(milliseconds: float) -> Finding:
    """Whether the broker is near enough: every request crosses this way several times."""
    text = f"{milliseconds:.2f} ms a round trip"
    if milliseconds <= SLOW_BROKER_MS:
        return Finding(Grade.OK, "latency", text)
    return Finding(Grade.WARN, "latency", text, "run workers and producers near the broker")


def check_workers(workers: Sequence[WorkerInfo], settings: Settings) -> Finding:
    """Whether somebody serves what is declared."""
    if not workers:
        return Finding(Grade.WARN, "workers", "none alive", "celery -A workers worker -Q pytorch")
    served = {name for worker in workers for engine in worker.engines for name in engine.models}
    text = f"{len(workers)} alive, serving {', '.join(sorted(served)) or 'no model'}"
    if starting := sum(not worker.ready for worker in workers):
        text += f" ({starting} still loading)"
    failed = {f"{name} ({reason})" for w in workers for e in w.engines for name, reason in e.failed.items()}
    unserved = sorted(set(settings.models.catalog) - served)
    if unserved or failed:
        problems = [f"nobody serves {', '.join(unserved)}"] if unserved else []
        problems += [f"could not be loaded: {'; '.join(sorted(failed))}"] if failed else []
        return Finding(
            Grade.WARN, "workers", f"{text}; {'; '.join(problems)}", "start the workers with this configuration"
        )
    return Finding(Grade.OK, "workers", text)


def check_strays(client: redis.Redis) -> Iterator[Finding]:
    """Whether requests wait where nobody reads: their senders call the queues otherwise than the fleet does."""
    try:
        strays = list(stray_lists(client, MOST_KEYS))
    except redis.exceptions.NoPermissionError:
        yield Finding(Grade.OK, "stray lists", "not looked for: this user may not scan the broker's keys")
        return
    for stray in strays:
        yield Finding(
            Grade.WARN, "stray lists", f"{stray.messages} on {stray.name}, which nobody reads: {stray.reason}",
            "send to the fleet's queues, without global_keyprefix, sep and priority_steps in broker_transport_options, "
            "and send what waits there again",
        )  # fmt: skip
    if not strays:
        yield Finding(Grade.OK, "stray lists", "none")


def check_chains(workers: Sequence[WorkerInfo], settings: Settings) -> Iterator[Finding]:
    """Which engines would be tried for each model now, in which order, and why the others would not."""
    for name, spec in settings.models.catalog.items() if workers else ():
        kind = spec.kinds[0]
        usual = spec.engine_preference or settings.optimization.engine_preference
        order = [engine for engine in usual if spec.served_by(engine) and settings.optimization.engine_enabled(engine)]
        live = [engine for engine in order if any(worker.serves(engine, name, kind) for worker in workers)]
        failed = {
            f"{info.name}: {info.failed[name]}" for worker in workers for info in worker.engines if name in info.failed
        }
        text = " > ".join(live) or "no engine"
        if failed:
            yield Finding(
                Grade.WARN, f"chain {name}", f"{text}; out of service: {'; '.join(sorted(failed))}",
                "the workers try again by themselves; their logs say more",
            )  # fmt: skip
        else:
            yield Finding(Grade.OK if live else Grade.WARN, f"chain {name}", text)


def check_weights(workers: Sequence[WorkerInfo]) -> Iterator[Finding]:
    """Whether the same weights are served under a name wherever it is served."""
    for name, text in differences(workers).items():
        yield Finding(
            Grade.WARN, f"weights {name}", f"different ones are served: {text}",
            "restart the workers with the older ones, or set models.newest_only",
        )  # fmt: skip


def check_parity(workers: Sequence[WorkerInfo]) -> Iterator[Finding]:
    """What came of holding each engine's answers to those of PyTorch."""
    for worker in workers:
        for info in worker.engines:
            for name, model in info.models.items():
                if not model.parity:
                    continue
                subject = f"parity {name}"
                if model.parity.startswith("unchecked"):
                    yield Finding(
                        Grade.WARN, subject, f"{info.name}: {model.parity}",
                        "start a worker with the pytorch engine, or raise optimization.parity.max_reference_mb",
                    )  # fmt: skip
                else:
                    yield Finding(Grade.OK, subject, f"{info.name}: {model.parity}")


def check_gpu_leases(board: GpuBoard) -> Finding:
    """Which worker has which GPU, and which GPUs failed and are left alone."""
    leased = [
        f"{lease.uuid} by {lease.holder.worker} (pid {lease.holder.pid}, {lease.seconds_left:.0f} s left)"
        for lease in board.leases
    ]
    text = f"{len(leased)} leased: {', '.join(leased)}" if leased else "none leased"
    if not board.marks:
        return Finding(Grade.OK, "gpu leases", text)
    marked = [f"{mark.uuid} for {mark.seconds_left:.0f} s more: {mark.reason}" for mark in board.marks]
    uuids = " ".join(mark.uuid for mark in board.marks)
    return Finding(
        Grade.WARN, "gpu leases", f"{text}; {len(marked)} marked as failed: {', '.join(marked)}",
        f"look at it with nvidia-smi -q -i {board.marks[0].uuid}; "
        f'once it is well: redis-cli -u "$REDIS_URL" ZREM {keys.GPU_MARKED} {uuids}',
    )  # fmt: skip
