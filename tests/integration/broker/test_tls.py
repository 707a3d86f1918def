"""``rediss://`` from end to end. The embedded broker has no TLS of its own: a proxy that has stands in front of it."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery

from producer import Client
from shared.errors import BrokerUnavailable
from shared.settings_loader import load_settings
from tests.support.fleet import FleetUnderTest
from tests.support.requests import ECHO
from tests.support.security import Authority, tls_in_front_of
from workers.celery import create_app


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """Who signs."""
    return Authority(tmp_path)


@pytest.fixture
def secure(make_fleet, broker, authority: Authority) -> Iterator[FleetUnderTest]:
    """A fleet behind TLS that asks its clients for certificates too."""
    server, client = authority.issue("broker"), authority.issue("client")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(authority.file))
    context.load_cert_chain(server.cert, server.key)
    context.verify_mode = ssl.CERT_REQUIRED
    files = {"tls_ca_file": str(authority.file), "tls_cert_file": str(client.cert), "tls_key_file": str(client.key)}
    with tls_in_front_of(broker.port, context) as port:
        fleet: FleetUnderTest = make_fleet(fleet=files)
        fleet.url = f"rediss://127.0.0.1:{port}/0"
        yield fleet
        fleet.stop()


def test_everything_goes_through_tls(secure: FleetUnderTest, authority: Authority) -> None:
    """Client, worker, replies, results for a plain Celery app, remote control and the doctor, with certificates."""
    secure.start_worker()
    settings = secure.settings
    files = settings.fleet
    plain = Celery("elsewhere", broker=secure.url, backend=secure.url, set_as_current=False)
    plain.conf.broker_use_ssl = plain.conf.redis_backend_use_ssl = {
        "ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_ca_certs": files.tls_ca_file, "ssl_certfile": files.tls_cert_file,
        "ssl_keyfile": files.tls_key_file,
    }  # fmt: skip

    answers = [secure.client.submit(ECHO).result(20).text for _ in range(3)]
    many = [handle.result(20).text for handle in secure.client.submit_many([ECHO] * 100)]
    foreign = plain.send_task("muai.infer", kwargs={"request": ECHO}, queue="fake").get(timeout=20)
    (pong,) = create_app(settings).control.inspect(timeout=5).ping().values()
    doctor = subprocess.run(
        [sys.executable, "-m", "producer.cli", "doctor"], env={**os.environ, **secure.environ}, capture_output=True,
        text=True, check=False, timeout=100,
    ).stdout  # fmt: skip

    assert answers + many == ["olleh"] * 103
    assert foreign["outputs"]["text"] == "olleh"
    assert pong == {"ok": "pong"}
    assert "the broker's certificate is checked" in " ".join(doctor.split())


def test_a_broker_that_cannot_show_its_certificate_is_not_believed(secure, tmp_path: Path) -> None:
    """Another authority, or none at all, is an error; only switching the check off lets it pass, and that is said."""
    url, other = secure.url, Authority(tmp_path, "other")
    wrong = load_settings(secure.config, {"REDIS_URL": url, "MUAI_FLEET_TLS_CA_FILE": str(other.file)})
    unknown = load_settings(secure.config, {"REDIS_URL": url, "MUAI_FLEET_TLS_CA_FILE": ""})
    off = {"MUAI_FLEET_TLS_VERIFY": "no"}
    in_url = {"REDIS_URL": f"{url}?ssl_cert_reqs=none"}

    for settings in (wrong, unknown):
        with Client(settings=settings) as client, pytest.raises(BrokerUnavailable, match="certificate"):
            client.fleet()
    for said, environ in ((False, {}), (True, off), (True, in_url)):
        done = subprocess.run(
            [sys.executable, "-m", "producer.cli", "status"], env={**os.environ, **secure.environ, **environ},
            capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        assert ("the broker's certificate is not checked" in done.stderr) is said
