"""How a broker must be set up to carry a fleet: checks of what it says of itself (``INFO``)."""

from __future__ import annotations

from typing import Any

from shared.clock import SKEW_SECONDS
from shared.findings import Finding, Grade

OLDEST_BROKER = (6, 2)

SKEW_REMEDY = "keep the clocks of all machines by one time server (chrony, systemd-timesyncd)"


def skewed(ahead: float) -> str:
    """How wrong this machine's clock is, that is so many seconds ahead of the broker's."""
    return f"this machine's clock is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} the broker's"


def check_clock(ahead: float | None) -> Finding:
    """Whether this machine's clock, so many seconds ahead of the broker's, is right."""
    if ahead is None or abs(ahead) <= SKEW_SECONDS:
        return Finding(Grade.OK, "clock", "agrees with the broker's")
    text = f"{skewed(ahead)}, and so are the times that bare Celery apps here send (eta, countdown, expires)"
    return Finding(Grade.WARN, "clock", text, SKEW_REMEDY)


def check_version(info: dict[str, Any], url: str) -> Finding:
    """Whether the server knows the commands that the scripts use."""
    version = str(info.get("redis_version", "0"))
    name = f"Valkey {info['valkey_version']}" if "valkey_version" in info else f"Redis {version}"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_BROKER:
        return Finding(Grade.FAIL, "broker", f"{name} at {url}; needed: 6.2 or newer", "upgrade the broker")
    return Finding(Grade.OK, "broker", f"{name} at {url}")


def check_persistence(info: dict[str, Any]) -> Finding:
    """Whether requests outlive the broker."""
    if int(info.get("aof_enabled", 0)):
        if info.get("aof_last_write_status", "ok") != "ok":
            return Finding(Grade.FAIL, "persistence", "the append-only file cannot be written", "make room on its disk")
        return Finding(Grade.OK, "persistence", "append-only file")
    return Finding(
        Grade.WARN, "persistence", "no append-only file: what waits is lost when the broker dies",
        'redis-cli -u "$REDIS_URL" CONFIG SET appendonly yes  (embedded: muai broker keeps one)',
    )  # fmt: skip


def check_eviction(info: dict[str, Any]) -> Finding:
    """Whether a full broker refuses new requests instead of dropping old ones."""
    policy, limit = str(info.get("maxmemory_policy", "noeviction")), int(info.get("maxmemory", 0))
    text = f"maxmemory-policy {policy}, maxmemory {f'{limit / 1e6:.0f} MB' if limit else 'not limited'}"
    if policy == "noeviction":
        return Finding(Grade.OK, "memory", text)
    remedy = 'redis-cli -u "$REDIS_URL" CONFIG SET maxmemory-policy noeviction'
    if limit:
        return Finding(Grade.FAIL, "memory", f"{text}: a full broker would drop requests", remedy)
    return Finding(Grade.WARN, "memory", f"{text}: with a limit it would drop requests", remedy)
