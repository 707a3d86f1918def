"""docker-compose.yml, Procfile and Dockerfile agree with each other and with what is promised of them."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest
import yaml

from demo.fleet import procfile
from shared.contract import EngineName
from tests.support.fleet import ROOT

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = ("vllm", "deepspeed", "onnx", "pytorch", "control", "beat", "flower")
TOP_LEVEL = {"name", "services", "volumes"}
SERVICE_KEYS = {
    "image", "build", "command", "restart", "stop_grace_period", "environment", "volumes", "depends_on", "healthcheck",
    "ports", "shm_size", "deploy", "profiles",
}  # fmt: skip


def essence(command: str) -> str:
    """A command without what differs by place: the app (in the image it is in APP), node names, addresses, files."""
    command = re.sub(r" -A workers| -n \S+| --address=\S+", "", command)
    return re.sub(r"--schedule \S+", "--schedule", command)


def test_compose_runs_the_procfiles_commands() -> None:
    """Each process of the Procfile is a service of the same name with the same command."""
    lines = procfile(ROOT / "Procfile")

    assert set(lines) == set(OURS)
    for name, command in lines.items():
        assert essence(SERVICES[name]["command"]) == essence(command)


def test_every_engine_has_a_service_and_an_image() -> None:
    """One service per engine, consuming the queue of its name, with an image whose extras the project file has."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for engine in EngineName:
        if engine is EngineName.FAKE:
            continue
        service = SERVICES[engine.value]

        assert service["command"] == f"celery worker -Q {engine.value}"
        assert set(service["build"]["args"]["EXTRAS"].split(",")) <= set(extras)
    assert len({SERVICES[engine.value]["image"] for engine in EngineName if engine is not EngineName.FAKE}) == 4


def test_compose_has_the_rest_of_the_fleet() -> None:
    """Broker with an append-only file, exporter and Prometheus are there; only known keys are used."""
    assert set(SERVICES) == {*OURS, "broker", "celery-exporter", "prometheus"}
    assert {key for key in COMPOSE if not key.startswith("x-")} <= TOP_LEVEL
    assert "--appendonly yes" in SERVICES["broker"]["command"]
    assert "noeviction" in SERVICES["broker"]["command"]
    for service in SERVICES.values():
        assert set(service) <= SERVICE_KEYS


@pytest.mark.parametrize("name", [*OURS, "broker", "celery-exporter", "prometheus"])
def test_services_can_be_scaled_and_are_not_open_to_the_world(name: str) -> None:
    """No container names; workers have no ports; what is published is published on loopback."""
    service = SERVICES[name]

    assert "container_name" not in service
    assert "ports" not in service or name in ("flower", "prometheus")
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))


def test_the_image_makes_celery_worker_literal() -> None:
    """The image sets APP, so that ``celery worker -Q onnx`` is the whole command in it, and does not run as root."""
    text = (ROOT / "config/docker/Dockerfile").read_text()

    assert re.search(r"\bAPP=workers\b", text)
    assert "USER muai" in text
