"""A small process that holds GPUs as a worker does. It writes a line for all that happens to its lease.

Its arguments are the tensor parallel size and three times in seconds: of a lease, of the longest wait, between two
checks. The lines are JSON: ``{"event": "held" | "grant" | "released" | "failed" | "refused", "gpus": [...], ...}``;
times are monotonic.

With the one argument ``fork`` it starts many at little cost, for what takes long is imported once: it reads a line
for each, ``{"log": <path>, "arguments": [...]}``, forks it, and writes its pid.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time

import redis

from shared.contract import EngineName
from shared.errors import NoDeviceAvailable
from shared.settings import Settings
from workers.devices.devices import Devices


def say(event: str, **values: object) -> None:
    """Write one line at once."""
    os.write(1, (json.dumps({"event": event, "pid": os.getpid(), "at": time.monotonic(), **values}) + "\n").encode())


def fork_all() -> None:
    """Fork a holder for each line of the input."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them here
    for line in sys.stdin:
        order = json.loads(line)
        if pid := os.fork():
            print(pid, flush=True)
        else:
            os.dup2(os.open(order["log"], os.O_WRONLY | os.O_CREAT, 0o600), 1)
            os._exit(main(order["arguments"]))


def main(arguments: list[str]) -> int:
    """Hold until SIGTERM, a failure, or a lost lease."""
    size, lease, wait, check = map(float, arguments)
    settings = Settings.model_validate(
        {
            "optimization": {
                "vllm": {"tensor_parallel_size": int(size)},
                "devices": {"lease_seconds": lease, "wait_seconds": wait, "check_seconds": check},
            }
        }
    )
    devices = Devices(settings, redis.Redis.from_url(os.environ["REDIS_URL"]), f"holder-{os.getpid()}")
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    reasons: list[str] = []

    def failed(reason: str) -> None:
        reasons.append(reason)
        ended.set()

    def stop_waiting() -> None:
        if ended.is_set():
            raise NoDeviceAvailable("stopped while waiting")

    try:
        devices.acquire([EngineName.VLLM], check=stop_waiting)
    except NoDeviceAvailable as error:
        say("refused", message=error.message)
        return 3
    devices.start(failed)
    holder = devices._holder
    assert holder is not None
    say("held", gpus=devices.gpus, visible=os.environ["CUDA_VISIBLE_DEVICES"])
    told = None
    while not ended.wait(0.01):
        grant = holder.grant
        if grant is not told and devices.valid:
            told = grant
            say("grant", gpus=devices.gpus, since=grant.since, until=grant.until)
    if reasons:
        say("failed", gpus=devices.gpus, reason=reasons[0])
    gpus = devices.gpus
    say("releasing", gpus=gpus)
    devices.release()
    say("released", gpus=gpus)
    return 1 if reasons else 0


if __name__ == "__main__":
    sys.exit(fork_all() if sys.argv[1] == "fork" else main(sys.argv[1:]))
