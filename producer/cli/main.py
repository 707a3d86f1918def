"""``muai``: the command line. Errors are lines on the standard error; status 2 is an error of use or of the broker."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, NoReturn

import orjson
import typer
import yaml

from producer.batch.run import BatchOptions, opened, run_batch
from producer.cli import spool as cli_spool
from producer.cli.doctor import examine
from producer.cli.options import Config, RedisUrl, settings_of
from producer.cli.show import (
    BatchProgress,
    console,
    dead_tables,
    finding,
    json_line,
    result_text,
    status_json,
    status_tables,
)
from producer.client.client import Client
from producer.client.dead import DeadLetter, DeadLetters
from producer.client.records import Outcome
from producer.client.shorthand import complete
from shared.contract import EngineName, InferenceRequest, Kind, Priority
from shared.errors import BadRequest, BrokerUnavailable, ConfigurationError, FleetError
from shared.findings import Grade
from shared.masking import masked
from shared.settings import Settings
from shared.settings_loader import configuration_file

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
ANSWER_GRACE = 2.0
"""Seconds that the news of a passed deadline may take."""

app = typer.Typer(
    help="Submit inference requests to the fleet and look after it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Timeout = Annotated[float | None, typer.Option("--timeout", min=0.001, help="Seconds.", show_default=False)]


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


# --- one request --------------------------------------------------------------------------------------------------


@app.command()
def submit(
    model: Annotated[str | None, typer.Option("--model", "-m", help="The model's name.", show_default=False)] = None,
    kind: Annotated[Kind | None, typer.Option(help="By default what the input suggests.", show_default=False)] = None,
    prompt: Annotated[str | None, typer.Option(help="The prompt of a generate request.", show_default=False)] = None,
    text: Annotated[list[str] | None, typer.Option(help="A text (of embed, classify, ...); repeatable.")] = None,
    message: Annotated[list[str] | None, typer.Option(help="role:content of a chat; repeatable.")] = None,
    query: Annotated[str | None, typer.Option(help="What to rerank the texts by.", show_default=False)] = None,
    source: Annotated[str | None, typer.Option("--json", help="A file with the request; - is the input.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens written.", show_default=False)] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.", show_default=False)] = None,
    top_p: Annotated[float | None, typer.Option(show_default=False)] = None,
    top_k: Annotated[int | None, typer.Option(show_default=False)] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Ends the answer; repeatable.")] = None,
    seed: Annotated[int | None, typer.Option(show_default=False)] = None,
    engine: Annotated[list[EngineName] | None, typer.Option(help="Engines to try, in order; repeatable.")] = None,
    priority: Annotated[Priority | None, typer.Option(show_default=False)] = None,
    conversation: Annotated[str | None, typer.Option(help="The conversation's id.", show_default=False)] = None,
    timeout: Timeout = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Without waiting, print the request's id.")] = True,
    raw: Annotated[bool, typer.Option("--raw", help="Print the whole result as JSON.")] = False,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Submit one request and print its answer."""
    given = {
        "model": model, "kind": kind, "prompt": prompt, "texts": text, "query": query, "max_tokens": max_tokens,
        "messages": [_message(one) for one in message] if message else None, "temperature": temperature,
        "top_p": top_p, "top_k": top_k, "stop": stop, "seed": seed, "engine_preference": engine, "priority": priority,
        "conversation_id": conversation,
    }  # fmt: skip
    options = {name: value for name, value in given.items() if value not in (None, [])}
    request = InferenceRequest.parse(complete({**_read_object(source), **options} if source else options))
    with Client(settings=settings_of(config, redis_url)) as client:
        handle = client.submit(request, timeout=timeout)
        if not wait:
            print(handle.id)
            return
        try:
            longest = None if timeout is None else timeout + ANSWER_GRACE
            outcome = handle.outcome(longest, through_outages=client.on_outage != "raise")
        except KeyboardInterrupt:
            sys.stderr.write(f"muai: the request goes on; its answer: muai result {handle.id}\n")
            raise
        _print_outcome(outcome, raw=raw)


def _message(text: str) -> dict[str, str]:
    role, colon, content = text.partition(":")
    if not colon:
        raise BadRequest(f"--message {role[:20]!r}: write it as role:content")
    return {"role": role.strip(), "content": content.lstrip()}


def _read_object(source: str) -> dict[str, Any]:
    with nullcontext(sys.stdin.buffer) if source == "-" else Path(source).open("rb") as stream:
        content = stream.read()
    try:
        data = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"{source} is not JSON: {error.msg} in line {error.lineno}") from None
    if not isinstance(data, dict):
        raise BadRequest(f"{source} does not hold a JSON object")
    return data


def _print_outcome(outcome: Outcome, *, raw: bool) -> None:
    if isinstance(outcome, FleetError):
        raise outcome
    rewritten = outcome.outputs.get("texts")
    if isinstance(rewritten, list) and not raw:
        for text in rewritten:
            print(text)
        return
    print(result_text(outcome, raw=raw))


@app.command()
def result(
    request_id: Annotated[str, typer.Argument(metavar="ID")],
    timeout: Annotated[float, typer.Option(min=0.0, help="Seconds to wait for it; 0 only looks.")] = 60.0,
    raw: Annotated[bool, typer.Option("--raw", help="Print the whole result as JSON.")] = False,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Print the answer to a request that was submitted before."""
    with Client(settings=settings_of(config, redis_url)) as client:
        try:
            outcome = client.handle(request_id).outcome(timeout, through_outages=False)
        except TimeoutError:
            kept = client.settings.fleet.result_expires_seconds
            raise TimeoutError(
                f"request {request_id} has no result: it is under way, nobody has submitted it, or it ended more "
                f"than {kept} s ago"
            ) from None
        _print_outcome(outcome, raw=raw)


@app.command()
def cancel(
    request_id: Annotated[str, typer.Argument(metavar="ID")], redis_url: RedisUrl = None, config: Config = None
) -> None:
    """Cancel a request."""
    with Client(settings=settings_of(config, redis_url)) as client:
        if not client.cancel(request_id):
            sys.stderr.write(f"muai: request {request_id} had ended before\n")
            raise typer.Exit(EXIT_FAILED)
    print(f"cancelled {request_id}")


@app.command()
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


# --- dead letters -------------------------------------------------------------------------------------------------

dead = typer.Typer(help="Look at the messages that were given up; replay or drop them.", no_args_is_help=True)
app.add_typer(dead, name="dead")

Letters = Annotated[list[str] | None, typer.Argument(help="Ids of letters or of their requests.", show_default=False)]
Everything = Annotated[bool, typer.Option("--all", help="All of them.")]
Reason = Annotated[str | None, typer.Option(help="Only those whose reason has this text.", show_default=False)]


@dead.command("list")
def dead_list(
    limit: Annotated[int, typer.Option(min=1, help="Most letters shown, the newest first.")] = 20,
    reason: Reason = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: a line for each.")] = False,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Show dead letters, without their inputs, and how many there are for each reason."""
    with Client(settings=settings_of(config, redis_url)) as client:
        letters = [letter for letter in client.dead_letters() if reason is None or reason in letter.reason]
    if as_json:
        for letter in letters[:limit]:
            print(json_line(letter.summary()))
        return
    out = console()
    for part in dead_tables(letters, limit):
        out.print(part)


@dead.command("show")
def dead_show(
    letter: Annotated[str, typer.Argument(help="The id of the letter or of its request.")],
    inputs: Annotated[bool, typer.Option("--inputs", help="Print the request's inputs too.")] = False,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Print a dead letter as JSON."""
    with Client(settings=settings_of(config, redis_url)) as client:
        for found in client.dead_letters().find([letter]):
            print(json_line(found.summary() | ({"arguments": found.arguments()} if inputs else {})))


@dead.command("replay")
def dead_replay(
    letters: Letters = None,
    everything: Everything = False,
    reason: Reason = None,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Put dead letters back on their queues: they are tried again, and their failure is forgotten."""
    with Client(settings=settings_of(config, redis_url)) as client:
        chosen = _chosen(client.dead_letters(), letters, everything, reason)
        print(f"{client.dead_letters().replay(chosen)} put back")


@dead.command("drop")
def dead_drop(
    letters: Letters = None,
    everything: Everything = False,
    reason: Reason = None,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Forget dead letters; what their callers were told stays."""
    with Client(settings=settings_of(config, redis_url)) as client:
        chosen = _chosen(client.dead_letters(), letters, everything, reason)
        print(f"{client.dead_letters().drop(chosen)} dropped")


def _chosen(store: DeadLetters, names: list[str] | None, everything: bool, reason: str | None) -> list[DeadLetter]:
    if names and not everything and reason is None:
        return store.find(names)
    if not names and (everything or reason is not None):
        return [letter for letter in store if reason is None or reason in letter.reason]
    raise BadRequest("name dead letters, or give --all or --reason; see: muai dead list")


app.add_typer(cli_spool.app, name="spool")

# --- the fleet ----------------------------------------------------------------------------------------------------


@app.command()
def status(
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Show the workers, the queues and the dead letters."""
    with Client(settings=settings_of(config, redis_url)) as client:
        workers, lengths = client.fleet(), client.queue_lengths()
    if as_json:
        print(status_json(workers, lengths))
        return
    out = console()
    for part in status_tables(workers, lengths):
        out.print(part)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Check this machine and say what mends it; exit status 1 where something fails."""
    settings: Settings | FleetError
    try:
        settings = settings_of(config, redis_url)
    except ConfigurationError as error:
        settings = error
    failed = False
    out = console()
    for item in examine(settings):
        failed = failed or item.grade is Grade.FAIL
        if as_json:
            print(
                json_line({"check": item.subject, "status": item.grade, "detail": item.detail, "remedy": item.remedy})
            )
        else:
            out.print(finding(item))
    if failed:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def broker(
    directory: Annotated[Path, typer.Option(help="Where its data is.")] = Path(".muai/broker"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 6379,
    append_only: Annotated[bool, typer.Option(help="Keep what waits over a restart.")] = True,
) -> None:
    """Run the embedded broker until interrupted."""
    from shared.embedded import EmbeddedBroker

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with EmbeddedBroker(directory, port or None, append_only=append_only) as embedded:
        print(f"export REDIS_URL={embedded.url}", flush=True)
        while not stop.wait(0.5):
            # Only looked at, not reaped: stopping it is the broker's own business.
            if os.waitid(os.P_PID, embedded.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                raise BrokerUnavailable(f"the embedded broker has ended; its log is in {directory}")


@app.command("config")
def show_config(redis_url: RedisUrl = None, config: Config = None) -> None:
    """Print the configuration as it counts here, secrets masked."""
    settings = settings_of(config, redis_url)
    print(f"# {configuration_file(config) or 'no file'}, over the defaults and under the environment")
    print(yaml.safe_dump(masked(settings.model_dump(mode="json")), sort_keys=False, allow_unicode=True), end="")


if __name__ == "__main__":
    main()
