"""``muai``: the command line. Errors are lines on the standard error; status 2 is an error of use or of the broker."""

from __future__ import annotations

import logging
import os
import sys
from typing import NoReturn

import typer

from producer.cli.commands import batch, dead, fleet, requests, spool
from producer.cli.options import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE
from shared.errors import FleetError

app = typer.Typer(
    help="Submit inference requests to the fleet and look after it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
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
        app()
    except FleetError as error:
        _fail(error.message)
    except TimeoutError as error:
        _fail(str(error))
    except BrokenPipeError:
        # Whoever read our output has gone; nothing more can be said there, not even when the interpreter flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILED)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def _fail(message: str) -> NoReturn:
    for line in message.splitlines():
        sys.stderr.write(f"muai: {line}\n")
    sys.exit(EXIT_USAGE)


if __name__ == "__main__":
    main()
