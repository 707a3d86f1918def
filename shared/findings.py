"""What checks report: of ``muai doctor``, and of a worker at its start."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Grade(StrEnum):
    """How a check came out. Only a failure stands in the way of running the fleet."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found; ``remedy`` is the command or the change that mends it."""

    grade: Grade
    subject: str
    detail: str
    remedy: str = ""
