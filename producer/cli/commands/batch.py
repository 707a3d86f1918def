"""``muai batch``: a file of requests."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from producer.batch.run import BatchOptions, opened, run_batch
from producer.cli.batch_progress import BatchProgress
from producer.cli.options import EXIT_FAILED, EXIT_INTERRUPTED, Config, RedisUrl, Timeout, settings_of
from producer.client.client import Client
from shared.contract import Kind
from shared.errors import BadRequest, BrokerUnavailable


def batch(
    source: Annotated[str, typer.Argument(metavar="IN.jsonl", help="A request on each line; - is the input.")],
    target: Annotated[str, typer.Argument(metavar="OUT.jsonl", help="An answer on each line; - is the output.")],
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
    """Answer a file of requests. Run it again to go on where it was stopped."""
    if source == target != "-" or (target != "-" and Path(target).exists() and Path(source).exists()
                                   and Path(source).samefile(target)):  # fmt: skip
        raise BadRequest("IN and OUT are the same file")
    options = BatchOptions(model, kind, window, timeout, retry_errors)
    settings = settings_of(config, redis_url)
    with (
        nullcontext(sys.stdin.buffer) if source == "-" else Path(source).open("rb") as stream,
        opened(target, drop_errors=retry_errors) as output,
        Client(settings=settings) as client,
        BatchProgress(None if source == "-" else Path(source).stat().st_size) as progress,
    ):
        try:
            summary = run_batch(client, stream, output, options, progress.report)
        except KeyboardInterrupt:
            sys.stderr.write(f"muai: stopped: {progress.summary}; run the same command again to go on\n")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokerUnavailable as error:
            sys.stderr.write(f"muai: stopped: {progress.summary}; run the same command again to go on\n")
            raise error from None
    sys.stderr.write(f"muai: {summary}\n")
    if summary.failed:
        raise typer.Exit(EXIT_FAILED)
