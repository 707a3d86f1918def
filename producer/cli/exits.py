"""With which status a command ends, so that a script can tell what to do."""

from __future__ import annotations

import errno
import sys
from enum import IntEnum

from shared.errors import (
    BadRequest,
    BrokerRefused,
    BrokerUnavailable,
    ConfigurationError,
    ContextTooLong,
    FleetError,
    IdConflict,
    MissingDependency,
    NoEngineAvailable,
    Overloaded,
    PayloadTooLarge,
    UnknownModel,
    UnsupportedKind,
)


class Exit(IntEnum):
    """The status of a command's end, as docs/command-line.md lists them."""

    OK = 0
    FAILED = 1
    """The request, or a line of the batch, has ended with an error; or the machine cannot go on (a full disk)."""
    USAGE = 2
    """Nothing was tried: options, configuration, files or the request are wrong."""
    REFUSED = 3
    """The fleet, or its broker, does not take this: another request or another time may do."""
    OUTAGE = 4
    """The broker is away or full: the same again is right when it is back."""
    NO_ANSWER = 5
    """There is no answer yet, as far as was waited for it."""
    INTERRUPTED = 130


_REFUSALS = (
    BrokerRefused, ContextTooLong, IdConflict, NoEngineAvailable, Overloaded, PayloadTooLarge, UnknownModel,
    UnsupportedKind,
)  # fmt: skip
_OF_THE_MACHINE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE})


def exit_of(error: FleetError | OSError) -> Exit:
    """The status for an error that ended a command."""
    if isinstance(error, _REFUSALS):
        return Exit.REFUSED
    if isinstance(error, BrokerUnavailable):
        return Exit.OUTAGE
    if isinstance(error, BadRequest | ConfigurationError | MissingDependency):
        return Exit.USAGE
    if isinstance(error, TimeoutError):
        return Exit.NO_ANSWER
    if isinstance(error, OSError):
        return Exit.FAILED if error.errno in _OF_THE_MACHINE else Exit.USAGE
    return Exit.FAILED


def exit_of_answer(error: FleetError) -> Exit:
    """The status for a request whose answer is ``error``: what is the caller's fault was found by a worker."""
    return Exit.REFUSED if isinstance(error, BadRequest) else exit_of(error)


def say(message: str) -> None:
    """Tell whoever sits at the terminal, a line of ours for each."""
    for line in message.splitlines():
        sys.stderr.write(f"muai: {line}\n")
