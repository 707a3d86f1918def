"""``muai batch``: a file of requests."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from producer.batch.run import BatchOptions, opened, run_batch
from producer.batch.streams import STANDARD, Source
from producer.cli.batch_progress import BatchProgress
from producer.cli.exits import Exit, say
from producer.cli.options import Config, RedisUrl, Timeout, settings_of
from producer.client.client import Client
from shared.contract import Kind
from shared.errors import BadRequest, BrokerUnavailable


def batch(
    source: Annotated[
        str, typer.Argument(metavar="IN.jsonl", help="A request on each line; - is the input; .gz, .zst.")
    ],
    target: Annotated[
        str, typer.Argument(metavar="OUT.jsonl", help="An answer on each line; - is the output; .gz, .zst.")
    ],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="For lines without one.", show_default=False)
    ] = None,
    kind: Annotated[Kind | None, typer.Option(help="For lines without one.", show_default=False)] = None,
    window: Annotated[int, typer.Option(min=1, max=100_000, help="Most requests under way at once.")] = 512,
    timeout: Timeout = None,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Try lines again that got an error.")] = False,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Answer a file of requests, compressed or not. Run it again to go on where it was stopped; not so into a pipe."""
    if source == target != STANDARD or _same_file(source, target):
        raise BadRequest("IN and OUT are the same file")
    options = BatchOptions(model, kind, window, timeout, retry_errors)
    settings = settings_of(config, redis_url)
    with (
        Source(source) as stream,
        opened(target, drop_errors=retry_errors) as output,
        Client(settings=settings) as client,
        BatchProgress(stream) as progress,
    ):
        try:
            summary = run_batch(client, stream, output, options, progress.report)
        except (KeyboardInterrupt, BrokerUnavailable, OSError) as error:
            say(f"stopped: {progress.summary}; run the same command again to go on")
            if isinstance(error, KeyboardInterrupt):
                raise typer.Exit(Exit.INTERRUPTED) from None
            raise error from None
    say(str(summary))
    if stream.damage is not None:
        raise stream.damage
    if summary.failed:
        raise typer.Exit(Exit.FAILED)


def _same_file(source: str, target: str) -> bool:
    one, other = Path(source), Path(target)
    return one.is_file() and other.is_file() and one.samefile(other)
