"""How a process that an engine has started says what went wrong."""

from __future__ import annotations

from collections.abc import Mapping

import shared.errors
from shared.errors import EngineError, FleetError


def error_to_json(error: BaseException) -> dict[str, str]:
    """An error as a message; what is not ours becomes an :class:`EngineError` with the class's name in the text."""
    if isinstance(error, FleetError):
        return {"class": type(error).__name__, "message": str(error)}
    return {"class": EngineError.__name__, "message": f"{type(error).__name__}: {error}"}


def error_from_json(data: Mapping[str, str]) -> FleetError:
    """The error that :func:`error_to_json` was given."""
    cls = getattr(shared.errors, data["class"], EngineError)
    if not (isinstance(cls, type) and issubclass(cls, FleetError)):
        cls = EngineError
    return cls(data["message"])
