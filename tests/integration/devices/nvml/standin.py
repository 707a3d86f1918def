"""Builds the stand-in NVML library and describes the GPUs that it shows."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

SOURCE = Path(__file__).with_name("nvml.c")


@dataclass(frozen=True)
class StandInGpu:
    """One GPU of the stand-in."""

    uuid: str
    used_mb: int = 0
    total_mb: int = 16384
    load: int = 0
    ecc: int = 0
    lost: bool = False
    xid: int = 0
    slice: bool = False

    def line(self) -> str:
        """As the library reads it."""
        return (
            f"{self.uuid} {self.used_mb} {self.total_mb} {self.load} {self.ecc} {int(self.lost)} {self.xid} "
            f"{int(self.slice)}"
        )


def uuid_of(index: int) -> str:
    """The uuid of the stand-in's GPU of this index."""
    return f"GPU-{index}{index}{index}{index}0000-0000-4000-8000-00000000000{index}"


def compiler() -> str | None:
    """The C compiler of this machine."""
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def build(folder: Path) -> Path:
    """Compile the library; returns the folder to put on ``LD_LIBRARY_PATH``."""
    target = folder / "libnvidia-ml.so.1"
    subprocess.run([compiler() or "cc", "-shared", "-fPIC", "-O1", "-o", target, SOURCE], check=True)
    return folder


class StandIn:
    """The GPUs of one machine. :attr:`environ` makes processes see them; changes take effect while they run."""

    def __init__(self, library: Path, state: Path, count: int) -> None:
        self._library = library
        self._state = state
        self.gpus = {uuid_of(index): StandInGpu(uuid_of(index)) for index in range(count)}
        self._write()

    @property
    def uuids(self) -> list[str]:
        """The uuids in the order of their indices."""
        return list(self.gpus)

    @property
    def environ(self) -> dict[str, str]:
        """Variables that make a process load the stand-in, as it would load the driver's library."""
        older = os.environ.get("LD_LIBRARY_PATH")
        path = f"{self._library}:{older}" if older else str(self._library)
        return {"LD_LIBRARY_PATH": path, "NVML_STATE": str(self._state)}

    def set(self, index: int, **changes: object) -> None:
        """Change a GPU, also while processes look at it."""
        uuid = self.uuids[index]
        self.gpus[uuid] = replace(self.gpus[uuid], **changes)
        self._write()

    def add(self, gpu: StandInGpu) -> None:
        """Show one GPU or slice more."""
        self.gpus[gpu.uuid] = gpu
        self._write()

    def _write(self) -> None:
        new = self._state.with_suffix(".new")
        new.write_text("".join(gpu.line() + "\n" for gpu in self.gpus.values()))
        new.rename(self._state)
