"""``muai status``, ``doctor``, ``broker`` and ``config``: the fleet and this machine."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Annotated

import typer
import yaml

from producer.cli.exits import Exit
from producer.cli.options import Config, RedisUrl, settings_of
from producer.cli.show import console, finding, json_line, status_json, status_tables
from producer.client.client import Client
from producer.doctor.examine import examine
from shared.errors import BrokerUnavailable, ConfigurationError, FleetError
from shared.findings import Grade
from shared.masking import masked
from shared.settings import Settings
from shared.settings_loader import configuration_file


def status(
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Show the workers, the queues and the dead letters."""
    with Client(settings=settings_of(config, redis_url)) as client:
        workers, lengths, strays = client.fleet(), client.queue_lengths(), client.stray_lists()
    if as_json:
        print(status_json(workers, lengths, strays))
        return
    out = console()
    for part in status_tables(workers, lengths, strays):
        out.print(part)


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
        raise typer.Exit(Exit.FAILED)


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


def show_config(redis_url: RedisUrl = None, config: Config = None) -> None:
    """Print the configuration as it counts here, secrets masked."""
    settings = settings_of(config, redis_url)
    print(f"# {configuration_file(config) or 'no file'}, over the defaults and under the environment")
    print(yaml.safe_dump(masked(settings.model_dump(mode="json")), sort_keys=False, allow_unicode=True), end="")
