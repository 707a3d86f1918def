"""The GPUs of one worker process: taken before CUDA is touched, watched while they are held, released at its end."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, MutableMapping, Sequence

import redis

from shared.contract import EngineName
from shared.errors import NoDeviceAvailable
from shared.settings import Settings
from workers.devices.builds import built_for_cuda
from workers.devices.demand import Demand, candidates_of, demand_of, shortage, too_few, visible_devices
from workers.devices.lease import GpuLeases, LeaseHolder
from workers.devices.monitor import DeviceMonitor, Failure, HealthPolicy, is_cuda_error
from workers.devices.nvml import Detected, Gpu, HealthSource, NvmlHealth, detect

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
"""How often a worker that waits for a GPU looks again."""


class Devices:
    """Leases GPUs for a worker's engines, and says when they can no longer be used.

    ``gpus`` are the uuids that are held, ``problems`` those that failed and why. Where the machine has no GPU, where no
    engine wants one or can use one, and where ``optimization.devices`` is switched off, there are none and nothing
    happens.
    """

    def __init__(
        self,
        settings: Settings,
        client: redis.Redis,
        worker_id: str,
        *,
        environ: MutableMapping[str, str] = os.environ,
        detect: Callable[[str | None], Detected] = detect,
        health: Callable[[Sequence[str]], HealthSource] = NvmlHealth,
        uses_cuda: Callable[[EngineName], bool] = built_for_cuda,
    ) -> None:
        self.gpus: tuple[str, ...] = ()
        self.problems: dict[str, str] = {}
        self._optimization = settings.optimization
        self._settings = settings.optimization.devices
        self._leases = GpuLeases(client, self._settings.lease_seconds, worker_id)
        self._environ = environ
        self._detect = detect
        self._health = health
        self._uses_cuda = uses_cuda
        self._holder: LeaseHolder | None = None
        self._monitor: DeviceMonitor | None = None
        self._on_failure: Callable[[str], None] | None = None
        self._failed = ""
        self._last_error: object = None
        self._lock = threading.Lock()

    # -- taking and releasing ---------------------------------------------------------------------------------------

    def acquire(self, engines: Iterable[EngineName], check: Callable[[], None] = lambda: None) -> None:
        """Lease what ``engines`` need and confine CUDA to it; wait for it where others have it.

        ``check`` is called every half second of the wait and ends it by raising. Time without a broker does not count
        as waiting: without one a worker can do nothing else either.

        Raises :class:`NoDeviceAvailable` where the machine has too few GPUs, or too few were free for
        ``optimization.devices.wait_seconds``.
        """
        demand = demand_of(self._optimization, filter(self._uses_cuda, engines))
        if not self._settings.enabled or not demand.count or self._holder is not None:
            return
        visible = self._environ.get("CUDA_VISIBLE_DEVICES")
        waited, told = 0.0, False
        while True:
            check()
            looked = time.monotonic()
            found = self._detect(visible)
            if not found.gpus:
                level = logging.WARNING if found.unexpected else logging.INFO
                logger.log(level, "no GPU is leased: %s", found.reason)
                return
            if text := too_few(demand, found.gpus):
                raise NoDeviceAvailable(text)
            try:
                if self._acquire(demand, found.gpus):
                    return
                text = shortage(demand, found.gpus, self._leases.board(), waited)
            except (redis.RedisError, OSError) as error:
                logger.warning("cannot lease a GPU, the broker does not answer: %s", error)
            else:
                if waited >= self._settings.wait_seconds:
                    raise NoDeviceAvailable(text)
                if not told:
                    logger.warning("waiting up to %.0f s for GPUs: %s", self._settings.wait_seconds, text)
                    told = True
                waited += POLL_SECONDS + time.monotonic() - looked
            time.sleep(POLL_SECONDS)

    def lack_of(self, engine: EngineName) -> str:
        """Why an engine cannot have the GPUs that it needs of a worker that runs; empty where it can or needs none."""
        demand = demand_of(self._optimization, filter(self._uses_cuda, [engine]))
        enough = len(self.gpus) >= demand.count and not demand.positions
        if not self._settings.enabled or enough or not self._detect(self._environ.get("CUDA_VISIBLE_DEVICES")).gpus:
            return ""
        return (
            f"it needs {demand.count} GPUs ({demand.why}), which a worker leases at its start, and this one has "
            f"{len(self.gpus)}; start another: celery -A workers worker -Q {engine}"
        )

    def _acquire(self, demand: Demand, gpus: Sequence[Gpu]) -> bool:
        candidates = candidates_of(demand, gpus)
        if len(candidates) < demand.count:
            return False
        asked_at = time.monotonic()
        lease = self._leases.acquire([gpu.uuid for gpu in candidates], demand.count)
        if lease is None:
            return False
        self._holder = LeaseHolder(self._leases, lease, asked_at, self._lost)
        self._holder.start()
        # However the process ends, short of being killed, the next one need not wait for the lease to expire.
        atexit.register(self.release)
        self.gpus = lease.gpus
        variables = visible_devices(demand, gpus, lease.gpus)
        self._environ.update(variables)
        names = {gpu.uuid: f"GPU {gpu.index} {gpu.name} {gpu.uuid}" for gpu in gpus}
        logger.info(
            "leased %s; %s", ", ".join(names[held] for held in lease.gpus),
            " ".join(f"{name}={value}" for name, value in variables.items()),
        )  # fmt: skip
        return True

    def start(self, on_failure: Callable[[str], None]) -> None:
        """Watch the held GPUs. ``on_failure`` is called once, from a thread, with why they must no longer be used."""
        with self._lock:
            self._on_failure, failed = on_failure, self._failed
        if failed:  # while the models were loading
            on_failure(failed)
        elif self.gpus:
            policy = HealthPolicy(self.gpus, self._settings.max_cuda_errors)
            source = self._health(self.gpus)
            self._monitor = DeviceMonitor(source, policy, self._settings.check_seconds, self._broken)
            self._monitor.start()

    def release(self) -> None:
        """Stop watching and give the GPUs back. May be called more than once."""
        atexit.unregister(self.release)
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            monitor.close()
        holder, self._holder = self._holder, None
        if holder is not None:
            holder.close()
        self.gpus = ()

    # -- failures ---------------------------------------------------------------------------------------------------

    @property
    def valid(self) -> bool:
        """Whether the GPUs are surely ours at this moment; ``False`` where none are held."""
        return self._holder is not None and self._holder.valid

    def saw(self, outcome: object) -> None:
        """An engine reported an outcome: count it where it is a CUDA error. From any thread, returns at once.

        All members of a batch that failed share its error, which counts once.
        """
        if self._monitor is not None and outcome is not self._last_error and is_cuda_error(outcome):
            self._last_error = outcome
            self.report_cuda_error()

    def report_cuda_error(self) -> None:
        """An engine met a CUDA error; ``max_cuda_errors`` of them within 60 s are a failure of the held GPUs."""
        if self._monitor is not None:
            self._monitor.report_cuda_error()

    def _broken(self, failure: Failure) -> None:
        self.problems = dict.fromkeys(failure.gpus, failure.reason)
        text = f"{', '.join(failure.gpus)} failed: {failure.reason}"
        logger.critical("%s; nobody leases it for %.0f s", text, failure.mark_seconds)
        try:
            self._leases.mark(failure.gpus, failure.reason, failure.mark_seconds)
        except (redis.RedisError, OSError) as error:
            logger.error("the failed GPU cannot be marked: %s", error)
        self._fail(text)

    def _lost(self, gpus: Sequence[str]) -> None:
        self._fail(f"the lease of {', '.join(gpus)} expired and another worker has it")

    def _fail(self, text: str) -> None:
        with self._lock:
            first, self._failed = not self._failed, self._failed or text
            on_failure = self._on_failure if first else None
        if on_failure is not None:
            on_failure(text)
