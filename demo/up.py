"""``make up``: the Procfile's processes through honcho, with a broker and a configuration where none are given."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
from pathlib import Path

from honcho import manager

from demo.fleet import STOP_SECONDS, procfile, threads
from demo.setup import broker, write_configuration
from shared.contract import EngineName
from shared.errors import ConfigurationError, FleetError
from shared.masking import masked_url as masked

RUN = Path(".muai/up")
FLOWER_PORT = 5555
PORTS_TRIED = 50
STOPPED = {0, *(sign * number for number in (signal.SIGINT, signal.SIGTERM) for sign in (1, -1)), 130, 143}
"""Exit statuses of a fleet that was told to stop."""

SUBMIT = """\
submit to it from another shell in this folder:

  export REDIS_URL='{url}' MUAI_CONFIG='{config}'
  {bin}/muai submit --model demo --prompt '12+34='
  {bin}/muai status

Flower: http://127.0.0.1:{flower_port}  (user and password: {auth})
stop with Ctrl-C
"""


def main() -> int:
    """Run until told to stop."""
    try:
        given = os.environ.get("MUAI_CONFIG")
        config = Path(given) if given else write_configuration(RUN / "fleet.yaml", os.environ.get("MODEL") or None)
        with broker(RUN / "broker", append_only=True) as url:
            return run(url, config.resolve())
    except FleetError as error:
        print(error.message, file=sys.stderr)
        return 1


def run(url: str, config: Path) -> int:
    """Say how to submit, and run the processes until a signal or the end of one of them."""
    binaries = Path(sys.executable).parent
    auth = os.environ.get("FLOWER_BASIC_AUTH") or f"muai:{secrets.token_urlsafe(12)}"
    flower_port = os.environ.get("FLOWER_PORT") or str(free_port_from(FLOWER_PORT))
    environ = {
        **threads(), **os.environ, "REDIS_URL": url, "MUAI_CONFIG": str(config), "PYTHONUNBUFFERED": "1",
        "PATH": os.pathsep.join([str(binaries), os.environ.get("PATH", "")]),
        "FLOWER_BASIC_AUTH": auth, "FLOWER_PORT": flower_port,
    }  # fmt: skip
    generated = "FLOWER_BASIC_AUTH" not in os.environ
    print(
        SUBMIT.format(
            url=masked(url), config=config, bin=binaries, flower_port=flower_port,
            auth=auth.replace(":", " ", 1) if generated else "from FLOWER_BASIC_AUTH",
        ),
        flush=True,
    )  # fmt: skip
    manager.KILL_WAIT = STOP_SECONDS
    processes = manager.Manager()
    for name, command in chosen(procfile(), os.environ.get("ENGINES") or "onnx,pytorch").items():
        # Without the shell in between, a stop reaches the process itself, and waits for it.
        processes.add_process(name, f"exec {command}", env=environ)
    processes.loop()
    code = int(processes.returncode or 0)
    return 0 if code in STOPPED else code


def free_port_from(first: int) -> int:
    """The first port on loopback, from this one on, that nobody listens on."""
    for port in range(first, first + PORTS_TRIED):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ConfigurationError(f"ports {first} to {first + PORTS_TRIED - 1} are taken; set FLOWER_PORT to a free one")


def chosen(commands: dict[str, str], engines: str) -> dict[str, str]:
    """The commands without the engines that are not asked for; raise :class:`ConfigurationError` for unknown ones."""
    known = {engine.value for engine in EngineName}
    wanted = set(engines.replace(",", " ").split())
    if unknown := sorted(wanted - (known & set(commands))):
        raise ConfigurationError(
            f"ENGINES names {', '.join(unknown)}; there are: {', '.join(sorted(known & set(commands)))}"
        )
    return {name: command for name, command in commands.items() if name not in known or name in wanted}


if __name__ == "__main__":
    sys.exit(main())
