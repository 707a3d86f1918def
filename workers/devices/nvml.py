"""What NVML says of the GPUs of this machine: which there are, how loaded they are, and whether they are well.

NVML is the driver's own library; asking it makes no CUDA context. Its binding ``nvidia-ml-py`` (``import pynvml``) is
imported only when it is asked, and its absence, like that of a driver or a GPU, is an answer and no error.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

DRIVER = Path("/proc/driver/nvidia/version")
"""Is there where the NVIDIA driver is loaded."""

SLICE_PREFIX = "MIG-"
_NO_GPU_ENTRIES = frozenset({"", "-1", "none", "void", "nodevfiles"})
_XID_WAIT_MS = 10
_MOST_EVENTS = 64


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU, or a MIG slice of one. ``index`` is NVML's (that of ``nvidia-smi``), -1 for a slice.

    A GPU that cannot be asked is there with ``healthy=False``, ``problem`` saying why, and perhaps without a uuid.
    """

    index: int
    uuid: str
    name: str = "GPU"
    memory_total_bytes: int = 0
    memory_used_bytes: int = 0
    utilization_percent: int = 0
    temperature_celsius: int | None = None
    healthy: bool = True
    problem: str = ""

    @property
    def load(self) -> tuple[int, int, int]:
        """Sorts the least loaded first: memory in use, then utilisation."""
        return self.memory_used_bytes, self.utilization_percent, self.index


@dataclass(frozen=True, slots=True)
class Detected:
    """The GPUs that may be used. Where there is none ``reason`` says why, and ``unexpected`` that there should be."""

    gpus: tuple[Gpu, ...] = ()
    reason: str = ""
    unexpected: bool = False


@dataclass(frozen=True, slots=True)
class Reading:
    """The health of one GPU at a moment.

    ``problem`` is set where the GPU no longer answers; ``uncorrected_ecc`` counts memory errors since the driver was
    loaded (``None``: not supported); ``xids`` are the critical driver events since the reading before.
    """

    uuid: str
    problem: str = ""
    uncorrected_ecc: int | None = None
    xids: tuple[int, ...] = ()


class HealthSource(Protocol):
    """Where readings come from."""

    def read(self) -> list[Reading]:
        """One reading for each GPU that is watched."""
        ...

    def close(self) -> None:
        """Free what is held."""
        ...


# --- which GPUs there are -----------------------------------------------------------------------------------------


def detect(visible: str | None) -> Detected:
    """The GPUs of this machine that ``visible``, the operator's ``CUDA_VISIBLE_DEVICES``, allows. Never raises."""
    try:
        with _nvml() as nvml:
            handles = [_attempt(nvml, nvml.nvmlDeviceGetHandleByIndex, index) for index in _indices(nvml)]
            gpus = [_describe(nvml, index, handle) for index, handle in enumerate(handles)]
            slices = [entry for entry in entries_of(visible) or () if entry.startswith(SLICE_PREFIX)]
            handles = [_attempt(nvml, nvml.nvmlDeviceGetHandleByUUID, entry) for entry in slices]
            gpus += [_describe(nvml, -1, handle, entry) for entry, handle in zip(slices, handles, strict=True)]
    except _Unusable as error:
        return Detected(reason=str(error), unexpected=DRIVER.exists())
    if not gpus:
        return Detected(reason="the driver shows no GPU")
    allowed = permitted(gpus, visible)
    return Detected(tuple(allowed), "" if allowed else f"CUDA_VISIBLE_DEVICES={visible!r} allows none")


def entries_of(visible: str | None) -> list[str] | None:
    """The entries of ``CUDA_VISIBLE_DEVICES`` up to one that ends the list; ``None`` where it is not set."""
    if visible is None:
        return None
    entries: list[str] = []
    for entry in (part.strip() for part in visible.split(",")):
        if entry.lower() in _NO_GPU_ENTRIES:
            break
        if entry not in entries:
            entries.append(entry)
    return entries


def permitted(gpus: Sequence[Gpu], visible: str | None) -> list[Gpu]:
    """Those of ``gpus`` that ``visible`` names: indices as ``nvidia-smi`` counts, or uuids, which may be shortened.

    CUDA silently ends the list at an entry that it does not know. Here such an entry stays, as a GPU with a problem:
    an operator who named a GPU that has fallen off the bus is told so, and is not served by the CPU instead.
    """
    entries = entries_of(visible)
    if entries is None:
        return [gpu for gpu in gpus if not gpu.uuid.startswith(SLICE_PREFIX)]
    found: list[Gpu] = []
    for entry in entries:
        gpu = _named(gpus, entry)
        if gpu not in found:
            found.append(gpu)
    return found


def _named(gpus: Sequence[Gpu], entry: str) -> Gpu:
    if entry.isdecimal():
        matches = [gpu for gpu in gpus if gpu.index == int(entry)]
    else:
        matches = [gpu for gpu in gpus if gpu.uuid.lower().startswith(entry.lower())]
    if len(matches) == 1:
        return matches[0]
    problem = "several GPUs match" if matches else "there is no such GPU"
    return Gpu(-1, "", healthy=False, problem=f"CUDA_VISIBLE_DEVICES names {entry!r}: {problem}")


def _indices(nvml: Any) -> range:
    try:
        return range(nvml.nvmlDeviceGetCount())
    except nvml.NVMLError as error:
        raise _Unusable(f"NVML cannot count the GPUs: {error}") from error


def _describe(nvml: Any, index: int, handle: Any, uuid: str = "") -> Gpu:
    """What a handle's GPU is like; a handle that is an error text is a GPU that cannot be asked."""
    if isinstance(handle, str):
        return Gpu(index, uuid, healthy=False, problem=handle)
    try:
        uuid = nvml.nvmlDeviceGetUUID(handle)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError as error:
        return Gpu(index, uuid, healthy=False, problem=str(error))
    rates = _optional(nvml, nvml.nvmlDeviceGetUtilizationRates, handle)
    return Gpu(
        index=index,
        uuid=uuid,
        name=_optional(nvml, nvml.nvmlDeviceGetName, handle) or "GPU",
        memory_total_bytes=int(memory.total),
        memory_used_bytes=int(memory.used),
        utilization_percent=int(rates.gpu) if rates is not None else 0,
        temperature_celsius=_optional(nvml, nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
    )


# --- whether they are well ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class NvmlHealth:
    """Reads the health of some GPUs. Holds NVML open until :meth:`close`. Used by one thread."""

    uuids: Sequence[str]
    _nvml: Any = None
    _handles: dict[str, Any] = field(default_factory=dict)
    _events: Any = None
    _heard: dict[int, str] = field(default_factory=dict)

    def read(self) -> list[Reading]:
        """One reading for each GPU. Never raises: a GPU that cannot be asked has a problem."""
        if self._nvml is None:
            try:
                self._open()
            except _Unusable as error:
                return [Reading(uuid, problem=str(error)) for uuid in self.uuids]
        xids = self._xids()
        return [self._read(uuid, tuple(xids.get(uuid, ()))) for uuid in self.uuids]

    def close(self) -> None:
        """Let NVML go."""
        if self._nvml is not None:
            nvml, self._nvml = self._nvml, None
            with suppress(nvml.NVMLError):
                if self._events is not None:
                    nvml.nvmlEventSetFree(self._events)
                nvml.nvmlShutdown()

    def _open(self) -> None:
        self._nvml = nvml = _initialised()
        for uuid in self.uuids:
            handle = _attempt(nvml, nvml.nvmlDeviceGetHandleByUUID, uuid)
            if not isinstance(handle, str):
                self._handles[uuid] = handle
        # Not every GPU, driver and container reports events; the other signs of a failure are then all there is.
        with suppress(nvml.NVMLError):
            self._events = nvml.nvmlEventSetCreate()
            for uuid, handle in self._handles.items():
                with suppress(nvml.NVMLError):
                    nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, self._events)
                    self._heard[_address(handle)] = uuid

    def _read(self, uuid: str, xids: tuple[int, ...]) -> Reading:
        nvml, handle = self._nvml, self._handles.get(uuid)
        if handle is None:
            return Reading(uuid, problem="NVML does not find it", xids=xids)
        try:
            nvml.nvmlDeviceGetMemoryInfo(handle)
        except nvml.NVMLError as error:
            gone = (nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_RESET_REQUIRED, nvml.NVML_ERROR_GPU_NOT_FOUND)
            return Reading(uuid, problem=str(error) if error.value in gone else "", xids=xids)
        counter = (nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC)
        return Reading(
            uuid, uncorrected_ecc=_optional(nvml, nvml.nvmlDeviceGetTotalEccErrors, handle, *counter), xids=xids
        )

    def _xids(self) -> dict[str, list[int]]:
        """The critical events since the last time, by GPU. One whose GPU is not known may be any held one's."""
        nvml, found = self._nvml, dict[str, list[int]]()
        if not self._heard:
            return found
        with suppress(nvml.NVMLError):  # a timeout: there is no further event
            for _ in range(_MOST_EVENTS):
                event = nvml.nvmlEventSetWait(self._events, _XID_WAIT_MS)
                if event.eventType == nvml.nvmlEventTypeXidCriticalError:
                    uuid = self._heard.get(_address(event.device))
                    for sufferer in [uuid] if uuid else self.uuids:
                        found.setdefault(sufferer, []).append(int(event.eventData))
        return found


def _address(handle: Any) -> int:
    """What makes a handle recognisable without asking a GPU that may no longer answer."""
    return ctypes.cast(handle, ctypes.c_void_p).value or 0


# --- the library --------------------------------------------------------------------------------------------------


class _Unusable(Exception):
    """NVML cannot be used here, and why."""


def _initialised() -> Any:
    try:
        nvml = import_module("pynvml")
    except ImportError as error:
        raise _Unusable('nvidia-ml-py is not installed: pip install "muai-fleet[gpu]"') from error
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise _Unusable(f"NVML: {error}") from error
    return nvml


@contextmanager
def _nvml() -> Iterator[Any]:
    nvml = _initialised()
    try:
        yield nvml
    finally:
        with suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _attempt(nvml: Any, function: Callable[..., Any], *args: Any) -> Any:
    """What ``function`` returns, or the text of its error."""
    try:
        return function(*args)
    except nvml.NVMLError as error:
        return str(error)


def _optional(nvml: Any, function: Callable[..., Any], *args: Any) -> Any:
    """What ``function`` returns; ``None`` where the GPU does not support the question."""
    try:
        return function(*args)
    except nvml.NVMLError:
        return None
