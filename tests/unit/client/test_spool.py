"""The spool: a file of requests that outlives its process, and who delivers them."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from producer.client.outage import spooling, waiting
from producer.client.spool_file import Spool
from producer.client.spool_sender import SpoolSender
from producer.client.steps import Pause, Steps, Work
from producer.client.submission import Submission
from shared.clock import BrokerClock
from shared.contract import InferenceRequest
from shared.errors import (
    BadRequest,
    BrokerRefused,
    BrokerUnavailable,
    ConfigurationError,
    FleetError,
    NoEngineAvailable,
    SpoolFull,
    UnknownModel,
    UnsupportedKind,
)
from tests.support.fleet import ROOT
from tests.support.waiting import eventually


def request(name: str, prompt: str = "hello", **fields: object) -> Submission:
    return Submission(InferenceRequest.parse({"id": name, "model": "echo", "inputs": {"prompt": prompt}, **fields}))


@pytest.fixture
def make_spool(tmp_path: Path) -> Iterator[Callable[..., Spool]]:
    """Opens the test's spool; again, as another process would."""
    made: list[Spool] = []

    def make(max_bytes: int = 1_000_000) -> Spool:
        made.append(Spool(tmp_path / "deep" / "spool.db", max_bytes))
        return made[-1]

    yield make
    for spool in made:
        spool.close()


def carry_out(steps: Steps) -> None:
    """Carries out steps."""
    with suppress(StopIteration):
        step = next(steps)
        while True:
            if isinstance(step, Pause):
                time.sleep(step.seconds)
            step = steps.send(step.function() if isinstance(step, Work) else None)


def stepwise(broker: Broker) -> Callable[[Sequence[Submission]], Steps[None]]:
    """Sends to the broker as steps do."""

    def send(submissions: Sequence[Submission]) -> Steps[None]:
        yield Pause(0)
        broker.send(submissions)

    return send


def submit(broker: Broker, sender: SpoolSender, *names: str) -> None:
    """Submits as a client does that spools."""
    carry_out(spooling(stepwise(broker), sender, [request(name) for name in names]))


def wait(broker: Broker, one: Submission, *, silent_after: float = 1.0, restarted: bool = False) -> None:
    """Submits as a client does that waits."""

    def young() -> Steps[bool]:
        yield Pause(0)
        return restarted

    carry_out(waiting(stepwise(broker), young, silent_after, BrokerClock(), [one]))


class Broker:
    """What requests are sent to: takes them, or raises what it is told."""

    def __init__(self, *errors: FleetError | None) -> None:
        self.taken: list[str] = []
        self.tries = 0
        self._errors = list(errors)

    def send(self, submissions: Sequence[Submission]) -> None:
        self.tries += 1
        requests = [submission.request for submission in submissions]
        error = self._errors.pop(0) if self._errors else None
        if error is not None:
            raise error
        bad = [one.id for one in requests if one.id.startswith("bad")]
        if bad:
            raise UnknownModel(f"no model for {bad}")
        if any(one.id.startswith("nobody") for one in requests):
            raise NoEngineAvailable
        self.taken += [one.id for one in requests]


def test_requests_come_out_as_they_went_in(make_spool) -> None:
    """The oldest first, whole, each id once, in a file that only its owner reads."""
    spool = make_spool()
    first = request("a", "ä\n", deadline=2e9, params={"max_tokens": 5}, priority="high")

    spool.add([first, request("b")])
    spool.add([request("a", "again"), request("c")])

    assert [entry.id for entry in spool] == ["a", "b", "c"]
    assert spool.oldest(1)[0].submission() == replace(first, tried=True)
    assert "ä" not in str(spool.oldest(1)[0].summary())
    assert stat.S_IMODE(spool.path.stat().st_mode) == 0o600


def test_a_full_spool_takes_all_or_none(make_spool) -> None:
    """Requests that do not fit are refused together, and there is room again when some are gone."""
    spool = make_spool(max_bytes=1500)
    spool.add([request("a", "x" * 1000)])

    with pytest.raises(SpoolFull, match=r"spool_max_bytes is 1500"):
        spool.add([request("b"), request("c", "x" * 1000)])

    assert [entry.id for entry in spool] == ["a"]
    assert spool.remove(spool.oldest(5)) == 1
    spool.add([request("c", "x" * 1000)])


def test_a_killed_process_leaves_its_requests_to_the_next(tmp_path: Path) -> None:
    """What was accepted is there after SIGKILL."""
    path = tmp_path / "spool.db"
    script = (
        "import os, sys, pathlib\nfrom producer.client.spool_file import Spool\n"
        "from producer.client.submission import Submission\n"
        "from shared.contract import InferenceRequest\n"
        "spool = Spool(pathlib.Path(sys.argv[1]), 10**6)\n"
        "for n in range(3):\n"
        "    request = {'id': str(n), 'model': 'm', 'inputs': {'prompt': 'p'}}\n"
        "    spool.add([Submission(InferenceRequest.parse(request))])\n"
        f"os.kill(os.getpid(), {signal.SIGKILL:d})\n"
    )

    done = subprocess.run([sys.executable, "-c", script, str(path)], cwd=ROOT, env=os.environ, check=False)

    assert done.returncode == -signal.SIGKILL
    spool = Spool(path, 10**6)
    assert [entry.id for entry in spool] == ["0", "1", "2"]
    spool.close()


def test_the_sender_spools_in_an_outage_and_delivers_in_order(make_spool) -> None:
    """The first failure spools; what comes while something is spooled goes behind it without another try."""
    broker = Broker(BrokerUnavailable(), BrokerUnavailable(), BrokerUnavailable())
    sender = SpoolSender(make_spool(), broker.send)

    submit(broker, sender, "a")
    tries = broker.tries
    submit(broker, sender, "b", "c")

    assert tries <= broker.tries <= 3
    eventually(lambda: broker.taken == ["a", "b", "c"])
    eventually(lambda: len(make_spool()) == 0)
    submit(broker, sender, "d")
    assert broker.taken[-1] == "d"
    sender.close()


def test_the_next_sender_delivers_what_the_last_one_left(make_spool) -> None:
    """A new client with the same spool needs nobody to tell it."""
    make_spool().add([request("a"), request("b")])
    broker = Broker()

    sender = SpoolSender(make_spool(), broker.send)
    sender.start()

    eventually(lambda: broker.taken == ["a", "b"])
    sender.close()


def test_what_nobody_serves_holds_nobody_up(make_spool) -> None:
    """One request that stays in the spool does not send those after it the long way."""
    make_spool().add([request("nobody")])
    broker = Broker()
    sender = SpoolSender(make_spool(), broker.send)
    sender.start()
    eventually(lambda: broker.tries >= 2)

    eventually(lambda: submit(broker, sender, "a") or "a" in broker.taken)
    submit(broker, sender, "b")

    eventually(lambda: "b" in broker.taken)
    eventually(lambda: [entry.id for entry in make_spool()] == ["nobody"])
    sender.close()


def test_a_file_that_is_no_spool_is_said(tmp_path: Path) -> None:
    """A path that cannot be used is an error of the configuration, not of SQLite."""
    path = tmp_path / "text"
    path.write_text("not a database, but long enough to be looked at " * 50)

    with pytest.raises(ConfigurationError, match=r"fleet.spool_path: .* cannot be used"):
        Spool(path, 1000)


def test_bad_ones_leave_and_unserved_ones_stay(make_spool) -> None:
    """A request that cannot be submitted gets its error; one that nobody serves now stays; neither stops the others."""
    spool = make_spool()
    late = request("late", deadline=1.0)
    spool.add([request("a"), request("bad"), request("nobody"), late, request("b")])
    answers: dict[str, object] = {}
    broker = Broker()

    sent = SpoolSender(spool, broker.send, answers.__setitem__).deliver()

    assert broker.taken == ["a", "b"]
    assert {name: type(answer).__name__ for name, answer in answers.items()} == {
        "bad": "UnknownModel",
        "late": "DeadlineExceeded",
    }
    assert [entry.id for entry in spool] == ["nobody"]
    assert sent == 4


def test_a_refusal_is_not_an_outage(make_spool) -> None:
    """A wrong password does not pass by itself: it is raised, not spooled and not waited for."""
    broker = Broker(BrokerRefused("no"))
    sender = SpoolSender(make_spool(), broker.send)

    with pytest.raises(BrokerRefused):
        submit(broker, sender, "a")
    with pytest.raises(BrokerRefused):
        wait(Broker(BrokerRefused("no")), request("a"))

    assert len(make_spool()) == 0
    sender.close()


def test_waiting_outlasts_an_outage_and_the_workers_return() -> None:
    """The same requests are sent until they are taken; workers not announced yet are waited for too."""
    broker = Broker(BrokerUnavailable(), BrokerUnavailable(), NoEngineAvailable())

    wait(broker, request("a"), silent_after=5.0)

    assert (broker.taken, broker.tries) == (["a"], 4)


@pytest.mark.parametrize("error", [NoEngineAvailable(), UnknownModel(), UnsupportedKind()])
def test_waiting_sees_that_the_broker_was_restarted(error: FleetError) -> None:
    """Its workers are waited for, though this client saw no outage; not for longer than they take to announce."""
    broker = Broker(error, error)

    wait(broker, request("a"), silent_after=5.0, restarted=True)

    assert (broker.taken, broker.tries) == (["a"], 3)
    with pytest.raises(type(error)):
        wait(Broker(*[error] * 100), request("a"), silent_after=0.3, restarted=True)


def test_waiting_ends_with_the_deadline() -> None:
    """A request with a deadline is not waited for longer; without an outage nobody to serve it is said at once."""
    with pytest.raises(BrokerUnavailable):
        wait(Broker(*[BrokerUnavailable()] * 100), request("a", deadline=time.time() + 0.3))
    with pytest.raises(NoEngineAvailable):
        wait(Broker(NoEngineAvailable()), request("a"))
    with pytest.raises(BadRequest):
        wait(Broker(BadRequest()), request("a"))
