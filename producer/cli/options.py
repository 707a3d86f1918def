"""What the commands have in common: options, and the settings that these stand for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from shared.settings import Settings
from shared.settings_loader import load_settings

RedisUrl = Annotated[str | None, typer.Option("--redis-url", help="The broker; also REDIS_URL.", show_default=False)]
Config = Annotated[
    Path | None, typer.Option("--config", help="The configuration file; also MUAI_CONFIG.", show_default=False)
]
Timeout = Annotated[float | None, typer.Option("--timeout", min=0.001, help="Seconds.", show_default=False)]


def settings_of(config: Path | None, redis_url: str | None) -> Settings:
    """The settings as these options, the environment and the file say."""
    # Given as the variable it stands for, the URL is checked like any other.
    return load_settings(config, {**os.environ, "MUAI_FLEET_REDIS_URL": redis_url} if redis_url else None)
