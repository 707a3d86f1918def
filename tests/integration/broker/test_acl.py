"""``config/redis/users.acl``: each role can do all of its work, and nothing else."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import yaml
from celery import chain, chord, group
from celery.result import GroupResult

from producer import Client
from shared.embedded import EmbeddedBroker
from shared.settings_loader import load_settings
from tests.support.fleet import FAKE, ROOT, FleetUnderTest
from tests.support.requests import ECHO, bare_app
from tests.support.shell import muai_says
from tests.support.waiting import eventually
from workers.celery import create_app

PASSWORD = "only here"  # noqa: S105  # of a broker that lives as long as its test


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedBroker]:
    """A broker with the file's users, each with a password; the default user, who is off in the file, looks on."""
    folder = tmp_path_factory.mktemp("acl")
    hashed = hashlib.sha256(PASSWORD.encode()).hexdigest()
    users = (ROOT / "config/redis/users.acl").read_text()
    users, off = re.subn(r"^user default off$", "user default on nopass ~* &* +@all", users, flags=re.M)
    users, given = re.subn(r"^user (\w+) off", rf"user \1 on #{hashed}", users, flags=re.M)
    assert (off, given) == (1, 5), "every user is off until it is given a password"
    (folder / "users.acl").write_text(users)
    with EmbeddedBroker(folder / "broker", options={"aclfile": str(folder / "users.acl")}) as broker:
        yield broker


def url(broker: EmbeddedBroker, user: str) -> str:
    """The broker for one of its users."""
    return f"redis://{user}:{PASSWORD.replace(' ', '%20')}@127.0.0.1:{broker.port}/0"


@pytest.fixture
def fleet(guarded: EmbeddedBroker, tmp_path: Path) -> Iterator[FleetUnderTest]:
    """A fleet whose workers are the worker user."""
    config = tmp_path / "fleet.yaml"
    quotas = {"fleet": {"tenants": {"acme": {"requests_per_second": 100}}}}
    config.write_text(yaml.safe_dump({**FAKE, **quotas}), encoding="utf-8")
    fleet = FleetUnderTest(url(guarded, "worker"), tmp_path, config)
    yield fleet
    fleet.stop()


def test_every_role_can_do_its_work(guarded: EmbeddedBroker, fleet: FleetUnderTest) -> None:
    """A producer's requests are served by a worker while a monitor sees the events; an operator looks after them.

    The broker's own log says whether anything at all was refused on the way.
    """
    admin = redis.Redis(port=guarded.port)
    admin.acl_log_reset()
    seen: set[str] = set()
    ready, done = threading.Event(), threading.Event()

    def watch() -> None:
        with app.connection() as connection:
            receiver = app.events.Receiver(connection, handlers={"*": take})
            with receiver.consumer_context() as (taken, *_):
                ready.set()
                while not done.is_set():
                    try:
                        taken.drain_events(timeout=0.2)
                    except TimeoutError:
                        continue

    def take(event: dict[str, object]) -> None:
        seen.add(str(event["type"]))

    app = bare_app(url(guarded, "monitor"))
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        fleet.start_worker()
        settings = load_settings(fleet.config, {})
        with Client(url(guarded, "producer"), settings) as client:
            asked = [{**ECHO, "priority": level} for level in ("high", "normal", "low")]
            texts = [handle.result(10).text for handle in client.submit_many([*asked, {**ECHO, "id": "chosen"}])]
            assert texts == ["olleh"] * 4
            assert client.handle("chosen").result(10).text == "olleh"
            assert client.submit({**ECHO, "tenant": "acme"}).result(10).text == "olleh"
            assert client.cancel("nobody") is True
            assert client.queue_lengths()["fake"] == 0
        plain = bare_app(url(guarded, "producer"))
        answer = plain.send_task("muai.infer", kwargs={"request": ECHO}, queue="fake")
        assert answer.get(timeout=10)["outputs"]["text"] == "olleh"
        operator = load_settings(fleet.config, {"REDIS_URL": url(guarded, "operator")})
        (pong,) = create_app(operator).control.inspect(timeout=2).ping().values()
        assert pong == {"ok": "pong"}
        operating = FleetUnderTest(url(guarded, "operator"), fleet.folder, fleet.config)
        assert "no dead letters" in muai_says(operating, "dead", "list")
        eventually(lambda: seen >= {"worker-online", "task-received", "task-succeeded"}, what="the events")
    finally:
        done.set()
        watcher.join()
        fleet.stop()

    assert [(entry["username"], entry["object"]) for entry in admin.acl_log()] == []


def test_a_producer_can_use_all_of_celerys_canvases(guarded: EmbeddedBroker, fleet: FleetUnderTest) -> None:
    """Chords, with groups in them too, groups that are saved and found again, and results that are forgotten.

    The broker's own log says whether anything at all was refused on the way.
    """
    admin = redis.Redis(port=guarded.port)
    admin.acl_log_reset()
    fleet.start_worker()
    app = bare_app(url(guarded, "producer"))
    call = app.signature("muai.infer", kwargs={"request": ECHO}, queue="fake")
    body = app.signature("muai.infer", kwargs={"request": {"model": "echo"}}, queue="fake")

    assert chord([call, call], body).apply_async().get(timeout=20)["outputs"]["text"] == "hello\nhello"
    nested = chord([group([call, call]), call], body.clone()).apply_async()
    assert nested.get(timeout=20)["outputs"]["text"]
    assert chain(call, body).apply_async().get(timeout=20)["outputs"]["text"] == "hello"
    saved = group([call, call]).apply_async()
    saved.save()
    found = GroupResult.restore(saved.id, app=app)
    assert [one["outputs"]["text"] for one in found.get(timeout=20)] == ["olleh", "olleh"]
    found.forget()
    found.delete()
    assert GroupResult.restore(saved.id, app=app) is None
    answer = call.apply_async()
    answer.get(timeout=20)
    answer.forget()
    assert app.AsyncResult(answer.id).state == "PENDING"

    assert [(entry["username"], entry["object"]) for entry in admin.acl_log()] == []


LEASED = "return redis.call('HGETALL', 'muai:lease:messages')"
EVERYBODY = ("FLUSHALL", "FLUSHDB", "CONFIG GET *", "ACL LIST", "KEYS *", "SHUTDOWN", "MONITOR")
REFUSED = {
    "producer": (
        *EVERYBODY, "SCAN 0", "SCRIPT FLUSH", "FUNCTION FLUSH", "CLIENT KILL 1", "HGETALL muai:lease:messages",
        "LRANGE fake 0 -1", "RPOP fake", "DEL fake", "UNLINK fake", "SET fake x", "EXPIRE fake 0", "RENAME fake x",
        "LRANGE muai:lane:fake:other 0 -1", "DEL muai:lane:fake:other", "XRANGE muai:dead - +", "XDEL muai:dead 0-1",
        "PSUBSCRIBE celery-task-meta-*", "PUBLISH /0.celery.pidbox x",
        "PSUBSCRIBE /0.celeryev/*", "GET somebody:elses",
    ),
    "worker": (
        *EVERYBODY, "SCAN 0", "SCRIPT FLUSH", "FUNCTION FLUSH", "CLIENT KILL 1", "SWAPDB 0 1", "GET somebody:elses",
        "SET somebody:elses x",
    ),
    "monitor": (
        *EVERYBODY, "SCAN 0", "LRANGE fake 0 -1", "LPUSH fake x", "DEL fake", "GET celery-task-meta-x",
        "XRANGE muai:dead - +", "HGETALL muai:lease:messages", "PUBLISH celery-task-meta-x x",
        "PSUBSCRIBE celery-task-meta-*", "XREAD STREAMS muai:reply:x 0",
    ),
    "operator": (*EVERYBODY, "CONFIG SET maxmemory 1"),
}  # fmt: skip


@pytest.mark.parametrize("user", REFUSED)
def test_no_role_can_do_more(guarded: EmbeddedBroker, user: str) -> None:
    """What a role has no business with is refused by the broker, from a script as well."""
    with redis.Redis.from_url(url(guarded, user)) as client:
        for command in REFUSED[user]:
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*command.split())
        if user not in ("worker", "operator"):
            with pytest.raises(redis.exceptions.ResponseError, match="permission"):
                client.execute_command("EVAL", LEASED, 0)


def test_nobody_gets_in_without_a_password(tmp_path: Path) -> None:
    """As it is in the repository the file lets nobody in: not the default user, and none of the roles."""
    users = tmp_path / "users.acl"
    users.write_text((ROOT / "config/redis/users.acl").read_text())
    with EmbeddedBroker(tmp_path / "broker") as broker, redis.Redis(port=broker.port) as admin:
        admin.set("there", 1)
        for line in users.read_text().splitlines():
            if not line.startswith("user default"):
                admin.execute_command("ACL", "SETUSER", *_words(line)[1:])
        admin.execute_command("ACL", "SETUSER", "default", "off")

        for user in ("default", "admin", *REFUSED):
            with (
                pytest.raises(redis.exceptions.AuthenticationError),
                redis.Redis(port=broker.port, username=user, password=PASSWORD) as client,
            ):
                client.ping()


def _words(line: str) -> list[str]:
    """The rules of a line; a selector in brackets is one."""
    return re.findall(r"\([^)]*\)|\S+", line)
