"""What the README tells a newcomer to type, on the fleet that ``make up`` starts."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from demo.setup import write_configuration
from producer import Client
from shared.embedded import free_port
from shared.settings_loader import load_settings
from tests.support.fleet import ROOT
from tests.support.processes import environment, left_of
from tests.support.waiting import eventually

README = (ROOT / "README.md").read_text(encoding="utf-8")
THERE = "redis://127.0.0.1:6379/0"
COMMANDS = [line for line in README.splitlines() if line.startswith("muai ")]

pytestmark = pytest.mark.timeout(600)


def blocks(language: str) -> list[str]:
    """The README's examples in a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def start(program: str, folder: Path, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a line of shell in a folder, with this project's commands."""
    named = f'muai() {{ {sys.executable} -m producer.cli "$@"; }}\n{program}'
    return subprocess.run(
        ["bash", "-c", named], cwd=folder, env=environ, capture_output=True, text=True, timeout=120, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """The folder in which ``make up`` runs, and the variables that it says to export."""
    folder = tmp_path_factory.mktemp("up")
    shutil.copy(ROOT / "Procfile", folder)
    config = write_configuration(folder / "fleet.yaml")
    given = yaml.safe_load(config.read_text())
    given["models"]["cache_dir"] = str(ROOT / ".muai" / "models")  # the demo's conversions
    config.write_text(yaml.safe_dump(given))
    environ = environment(
        PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), MUAI_CONFIG=str(config),
        ENGINES="onnx", FLOWER_PORT=str(free_port()),
    )  # fmt: skip
    with (folder / "up.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "demo.up"], cwd=folder, env=environ, stdout=log, stderr=log)
    try:
        said = eventually(lambda: re.search(r"export REDIS_URL='(\S+)'", (folder / "up.log").read_text()))
        environ["REDIS_URL"] = said[1]
        with Client(settings=load_settings(config, environ)) as client:
            eventually(lambda: any(w.ready and "onnx" in w.queues for w in client.fleet()), 500, "the fleet")
        yield folder, environ
    finally:
        process.send_signal(signal.SIGINT)
        code = process.wait(90)
    assert code == 0, (folder / "up.log").read_text()[-2000:]
    eventually(lambda: not left_of(environ), what="the end of the fleet")


@pytest.mark.parametrize("number", range(2), ids=["our client", "any Celery app"])
def test_the_examples_in_python(up, number: int) -> None:
    """They print the answer that the comment says."""
    folder, environ = up
    code = blocks("python")[number]
    assert "# 46" in code

    done = subprocess.run(
        [sys.executable, "-c", code.replace(THERE, environ["REDIS_URL"])], cwd=folder, env=environ, text=True,
        capture_output=True, timeout=120, check=False,
    )  # fmt: skip

    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "46"), done.stderr


def test_the_commands(up) -> None:
    """Every ``muai`` line does what it says."""
    folder, environ = up
    (folder / "in.jsonl").write_text('{"prompt": "12+34="}\n')

    done = {command.split("  ")[0]: start(command, folder, environ) for command in COMMANDS}

    assert len(done) == 6
    assert {command: ended.stderr for command, ended in done.items() if ended.returncode} == {}
    assert done["muai submit --model demo --prompt '12+34='"].stdout == "46\n"
    (answer,) = map(json.loads, (folder / "out.jsonl").read_text().splitlines())
    assert answer["result"]["outputs"]["text"] == "46"


def test_the_configuration(tmp_path: Path) -> None:
    """The example is a whole configuration."""
    (example,) = blocks("yaml")
    (tmp_path / "fleet.yaml").write_text(example)

    assert set(load_settings(tmp_path / "fleet.yaml", {}).models.catalog) == {"demo", "minilm"}


def test_every_make_target_that_is_named_is_there() -> None:
    """In the README, and in every page of the documentation."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        target
        for page in [ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/*.md")]
        for target in re.findall(r"`make ([a-z-]+)", page.read_text(encoding="utf-8"))
    }

    assert len(named) > 5
    assert named - targets == set()
