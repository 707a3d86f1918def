"""When a held GPU counts as failed, and the thread that looks.

The policy is plain decisions over readings; times are handed to it. What follows from a failure is the caller's.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from shared.errors import EngineOutOfMemory, FleetError
from workers.devices.nvml import HealthSource, Reading

logger = logging.getLogger(__name__)

HARDWARE_MARK_SECONDS = 3600.0
"""How long a GPU is left alone after its hardware failed: long enough for somebody to look."""

SOFTWARE_MARK_SECONDS = 120.0
"""How long after CUDA errors: often a program's fault, and the same GPU serves well again in a new process."""

CUDA_ERROR_WINDOW = 60.0

APPLICATION_XIDS = frozenset({13, 31, 43, 45, 68, 109})
"""Events that a faulty program causes on a sound GPU (illegal instructions and addresses, channels torn down)."""

_CUDA_ERROR_SIGNS = (
    "cuda error", "cuda failure", "cudaerror", "cublas_status", "cudnn_status", "nccl error", "device-side assert",
    "illegal memory access", "unspecified launch failure", "uncorrectable ecc",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Failure:
    """GPUs that are not to be used any longer, why, and for how many seconds nobody should lease them."""

    gpus: tuple[str, ...]
    reason: str
    mark_seconds: float


class HealthPolicy:
    """Decides from readings and reported errors whether one of the ``held`` GPUs has failed."""

    def __init__(self, held: Sequence[str], max_cuda_errors: int) -> None:
        self._held = tuple(held)
        self._max_cuda_errors = max_cuda_errors
        self._ecc_at_start: dict[str, int] = {}
        self._cuda_errors: deque[float] = deque()

    def judge(self, readings: Iterable[Reading]) -> Failure | None:
        """The failure that ``readings`` show; all GPUs that failed in the same way at once are in it."""
        failed: dict[str, str] = {}
        for reading in readings:
            if reason := self._fault(reading):
                failed[reading.uuid] = reason
        if not failed:
            return None
        return Failure(tuple(failed), "; ".join(dict.fromkeys(failed.values())), HARDWARE_MARK_SECONDS)

    def cuda_error(self, now: float) -> Failure | None:
        """An engine met a CUDA error at ``now`` (seconds of any steady clock). Which of several GPUs is not known."""
        self._cuda_errors.append(now)
        while now - self._cuda_errors[0] > CUDA_ERROR_WINDOW:
            self._cuda_errors.popleft()
        if len(self._cuda_errors) < self._max_cuda_errors:
            return None
        reason = f"{len(self._cuda_errors)} CUDA errors within {CUDA_ERROR_WINDOW:.0f} s"
        return Failure(self._held, reason, SOFTWARE_MARK_SECONDS)

    def _fault(self, reading: Reading) -> str:
        if reading.problem:
            return f"it no longer answers ({reading.problem})"
        critical = sorted(set(reading.xids) - APPLICATION_XIDS)
        if critical:
            return f"critical driver event: Xid {', '.join(map(str, critical))}"
        if reading.uncorrected_ecc is not None:
            before = self._ecc_at_start.setdefault(reading.uuid, reading.uncorrected_ecc)
            if reading.uncorrected_ecc > before:
                return f"uncorrected memory errors rose from {before} to {reading.uncorrected_ecc}"
        return ""


def is_cuda_error(outcome: object) -> bool:
    """Whether an engine's error speaks of the GPU. Memory that is out does not: that is the size of the batch."""
    if not isinstance(outcome, FleetError) or isinstance(outcome, EngineOutOfMemory):
        return False
    text = outcome.message.lower()
    return "out of memory" not in text and any(sign in text for sign in _CUDA_ERROR_SIGNS)


class DeviceMonitor:
    """Looks at the held GPUs every few seconds and calls ``on_failed`` once, on its own thread."""

    def __init__(
        self,
        source: HealthSource,
        policy: HealthPolicy,
        check_seconds: float,
        on_failed: Callable[[Failure], None],
    ) -> None:
        self._source = source
        self._policy = policy
        self._check_seconds = check_seconds
        self._on_failed = on_failed
        self._reported: deque[float] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="gpu-monitor", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def report_cuda_error(self) -> None:
        """An engine met a CUDA error now. Returns at once; from any thread."""
        self._reported.append(time.monotonic())
        self._wake.set()

    def close(self) -> None:
        """Stop the thread; one that hangs in the driver is left to itself."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout=5)

    def _run(self) -> None:
        try:
            while not self._stopping:
                failure = self._errors() or self._policy.judge(self._source.read())
                if failure is not None:
                    self._on_failed(failure)
                    return
                self._wake.wait(self._check_seconds)
                self._wake.clear()
        finally:
            self._source.close()

    def _errors(self) -> Failure | None:
        failure = None
        while self._reported:
            failure = self._policy.cuda_error(self._reported.popleft()) or failure
        return failure
