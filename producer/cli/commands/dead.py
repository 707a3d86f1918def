"""``muai dead``: the messages that were given up."""

from __future__ import annotations

from typing import Annotated

import typer

from producer.cli.options import Config, RedisUrl, settings_of
from producer.cli.show import console, dead_tables, json_line
from producer.client.client import Client
from producer.client.dead_letters import DeadLetter, DeadLetters
from shared.errors import BadRequest

app = typer.Typer(help="Look at the messages that were given up; replay or drop them.", no_args_is_help=True)

Letters = Annotated[list[str] | None, typer.Argument(help="Ids of letters or of their requests.", show_default=False)]
Everything = Annotated[bool, typer.Option("--all", help="All of them.")]
Reason = Annotated[str | None, typer.Option(help="Only those whose reason has this text.", show_default=False)]


@app.command("list")
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


@app.command("show")
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


@app.command("replay")
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


@app.command("drop")
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
