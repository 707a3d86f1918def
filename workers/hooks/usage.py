"""What of Celery's command line has no meaning here, and how the command ends where it cannot do what it is to."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any, Final, NoReturn

import click
from celery.platforms import EX_USAGE

from shared.errors import ConfigurationError, FleetError


def end_with(error: FleetError) -> NoReturn:
    """Say what is wrong and end; Celery would show how it came to ask. In any other program the error is raised."""
    if click.get_current_context(silent=True) is None:
        raise error
    for line in error.message.splitlines():
        click.echo(f"Error: {line}", err=True)
    raise SystemExit(EX_USAGE) from None


POOL: Final = "solo"
"""The pool of Celery's that what is no request runs in. Engines run on threads of their own, requests in batches."""

HOW_MUCH = "how much runs at once is optimization.batcher.max_batch_size; for more, start more workers"

_DEFAULT_POOL = re.compile("(-P|--pool=)?(prefork|processes)")

IDLE: Final[Mapping[str, tuple[Any, str]]] = {
    "concurrency": (1, HOW_MUCH),
    "prefetch_multiplier": (1, "a worker claims what it can start soon"),
    "optimization": ("default", HOW_MUCH),
    "max_tasks_per_child": (None, "there are no child processes"),
    "max_memory_per_child": (None, "there are no child processes; models.max_cached bounds what is loaded"),
}
"""Options that do nothing here: what they are where nobody gives them, and what is meant instead."""


def pool_of(pool: Any) -> str:
    """The name of the pool that a worker is to have. Celery takes its own default for a pool that nobody asked for."""
    context = click.get_current_context(silent=True)
    asked = context is not None and context.get_parameter_source("pool") is click.core.ParameterSource.COMMANDLINE
    named = next((found[2] for argument in sys.argv if (found := _DEFAULT_POOL.fullmatch(argument))), None)
    if asked and named is not None:
        return named
    name = pool if isinstance(pool, str) else getattr(pool, "__module__", POOL)
    return name.rpartition(".")[2]


def check_options(options: Mapping[str, Any]) -> list[str]:
    """Warnings of a worker's options that have no effect.

    Raises :class:`ConfigurationError` for those whose effect would not be what was asked for.
    """
    name = pool_of(options.get("pool") or options.get("pool_cls") or POOL)
    if name != POOL:
        raise ConfigurationError(
            f"-P {name}: engines run on threads of their own, and what else a worker runs on its loop; leave -P out"
        )
    if options.get("autoscale"):
        raise ConfigurationError(f"--autoscale: a worker has no pool to resize; {HOW_MUCH}")
    return [
        f"--{option.replace('_', '-')} has no effect: {instead}"
        for option, (usual, instead) in IDLE.items()
        if options.get(option) not in (None, usual)
    ]
