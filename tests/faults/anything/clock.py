"""A clock that is wrong, and that steps while a process runs. The processes beside it have the right one."""

from __future__ import annotations

import gc
import mmap
import struct
import sys
import time
from pathlib import Path
from types import FunctionType
from typing import Any

CLOCK = "FAULTS_CLOCK"
"""The environment variable that names the file with the seconds by which a process's clock is off."""

_SECONDS = struct.Struct("d")


def set_offset(path: Path, seconds: float) -> None:
    """From now on the clocks that go by this file are off by so many seconds."""
    mode = "r+b" if path.exists() else "w+b"
    with path.open(mode) as file:
        file.write(_SECONDS.pack(seconds))


def now() -> float:
    """The right time, whatever this process's clock says: seconds since the epoch."""
    return time.clock_gettime(time.CLOCK_REALTIME)


def be_wrong(path: Path) -> None:
    """Have ``time.time`` of this process go by the file, for whoever has it in hand already too."""
    right = time.time
    file = path.open("r+b")
    held = mmap.mmap(file.fileno(), _SECONDS.size)

    def wrong() -> float:
        return now() + float(_SECONDS.unpack(held)[0])

    for module in list(sys.modules.values()):
        for name, value in list(vars(module).items()):
            if value is right:
                setattr(module, name, wrong)
    for thing in gc.get_objects():
        if type(thing) is FunctionType:  # not isinstance, which some answer with a warning
            _mend_defaults(thing, right, wrong)


def _mend_defaults(function: FunctionType, right: Any, wrong: Any) -> None:
    if function.__defaults__ and right in function.__defaults__:
        function.__defaults__ = tuple(wrong if value is right else value for value in function.__defaults__)
    for name, value in (function.__kwdefaults__ or {}).items():
        if value is right:
            function.__kwdefaults__[name] = wrong
