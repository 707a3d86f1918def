"""``muai``: the command line. Errors are lines on the standard error; what the status says is in ``exits``."""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import typer

from producer.batch.streams import STANDARD_OUTPUT, naming
from producer.cli.commands import batch, dead, fleet, requests, spool
from producer.cli.exits import Exit, exit_of, say
from producer.doctor.machine import version_of
from shared.errors import FleetError

app = typer.Typer(
    help="Submit inference requests to the fleet and look after it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"muai {version_of('muai-fleet') or 'from a folder that is not installed'}\n")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


for command in (
    requests.submit,
    requests.result,
    requests.cancel,
    batch.batch,
    fleet.status,
    fleet.doctor,
    fleet.broker,
):
    app.command()(command)
app.command("config")(fleet.show_config)
app.add_typer(dead.app, name="dead")
app.add_typer(spool.app, name="spool")


def main() -> None:
    """The entry point of the ``muai`` command."""
    # A lost broker is reported by the command that needs it, once; the reader would say it every half second.
    logging.getLogger("producer.client.replies").setLevel(logging.ERROR)
    try:
        with naming(STANDARD_OUTPUT):  # whatever is about another file says so itself
            try:
                app()
            finally:
                _flush()
    except FleetError as error:
        say(error.message)
        sys.exit(exit_of(error))
    except OSError as error:
        if not (isinstance(error, BrokenPipeError) and error.filename == STANDARD_OUTPUT):  # whoever read it has gone
            say(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        sys.exit(exit_of(error))
    except KeyboardInterrupt:
        sys.exit(Exit.INTERRUPTED)


def _flush() -> None:
    """Write out what was printed: what cannot be written is to be said here, not when the interpreter ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


if __name__ == "__main__":
    main()
