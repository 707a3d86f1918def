"""``muai spool``: requests that were submitted while the broker was away; to look at, send and drop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from producer.cli.options import Config, RedisUrl, settings_of
from producer.cli.show import console, json_line, spool_tables
from producer.client.client import Client
from producer.client.spool_file import Spool
from shared.errors import BadRequest
from shared.settings import Settings

app = typer.Typer(help="Look at the requests that wait for the broker; send or drop them.", no_args_is_help=True)


@contextmanager
def _opened(settings: Settings) -> Iterator[Spool]:
    path = Path(settings.fleet.spool_path)
    if not path.exists():
        raise BadRequest(f"there is no spool at {path} (fleet.spool_path)")
    spool = Spool(path, settings.fleet.spool_max_bytes)
    try:
        yield spool
    finally:
        spool.close()


@app.command("list")
def spool_list(
    limit: Annotated[int, typer.Option(min=1, help="Most requests shown, the oldest first.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: a line for each.")] = False,
    config: Config = None,
) -> None:
    """Show spooled requests, without their inputs."""
    settings = settings_of(config, None)
    if not Path(settings.fleet.spool_path).exists():
        if not as_json:
            print(f"the spool is empty: there is no file {settings.fleet.spool_path} (fleet.spool_path)")
        return
    with _opened(settings) as spool:
        entries, total = spool.oldest(limit), len(spool)
    if as_json:
        for entry in entries:
            print(json_line(entry.summary()))
        return
    out = console()
    for part in spool_tables(entries, total):
        out.print(part)


@app.command("send")
def spool_send(redis_url: RedisUrl = None, config: Config = None) -> None:
    """Submit all of them now, the oldest first. One that is submitted already is not run again."""
    settings = settings_of(config, redis_url)
    with _opened(settings) as spool, Client(settings=settings, on_outage="raise") as client:
        print(f"{client.deliver(spool)} sent, {len(spool)} left")


@app.command("drop")
def spool_drop(
    requests: Annotated[list[str] | None, typer.Argument(help="Ids of requests.", show_default=False)] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    config: Config = None,
) -> None:
    """Forget spooled requests: they are not submitted."""
    if bool(requests) == everything:
        raise BadRequest("name requests, or give --all; see: muai spool list")
    with _opened(settings_of(config, None)) as spool:
        chosen = [entry for entry in spool if everything or entry.id in set(requests or ())]
        if missing := set(requests or ()) - {entry.id for entry in chosen}:
            raise BadRequest(f"there is no spooled request {', '.join(sorted(missing))}; see: muai spool list")
        print(f"{spool.remove(chosen)} dropped")
