"""``muai`` against a real broker and a real worker, as the processes a user would start."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from shared import keys
from shared.embedded import EmbeddedBroker
from tests.support.fleet import ROOT, FleetUnderTest
from tests.support.shell import TIMEOUT, muai, start
from tests.support.waiting import eventually


def write_prompts(path: Path, count: int) -> list[str]:
    """An input of ``count`` lines; the prompts are returned."""
    prompts = [f"prompt {number}" for number in range(1, count + 1)]
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return prompts


def read_answers(path: Path) -> list[dict]:
    """The whole lines of an answer file."""
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def assert_answered(path: Path, prompts: list[str]) -> None:
    """Every line is answered once, with its own answer."""
    answers = {item["line"]: item["result"]["outputs"]["text"] for item in read_answers(path)}
    assert answers == {number: prompt[::-1] for number, prompt in enumerate(prompts, start=1)}
    assert len(read_answers(path)) == len(prompts)


def claims(fleet: FleetUnderTest) -> int:
    """How many messages workers have taken so far."""
    return int(fleet.client._redis.get(keys.LEASE_COUNTER) or 0)


def settled(fleet: FleetUnderTest) -> None:
    """Wait until nothing waits and nothing runs."""
    eventually(lambda: not any(fleet.client.queue_lengths().values()), what="an idle fleet")


# --- one request ------------------------------------------------------------------------------------------------------


def test_submit_prints_the_answer(fleet):
    """A prompt in, its text out; with --raw the whole result."""
    text = muai(fleet, "submit", "-m", "echo", "--prompt", "abc")
    raw = muai(fleet, "submit", "-m", "echo", "--message", "user: abc", "--raw")
    embedded = muai(fleet, "submit", "-m", "echo", "--text", "a", "--text", "b")

    assert text == (0, "cba\n", "")
    assert json.loads(raw[1])["engine_used"] == "fake"
    assert json.loads(raw[1])["outputs"]["message"]["content"] == "cba"
    assert len(json.loads(embedded[1])["embeddings"]) == 2


def test_submit_asks_for_every_kind_of_answer_to_texts(make_fleet):
    """--kind, --text and --query are all it takes; rewritten texts are printed a line each, scores as JSON."""
    kinds = ["classify", "rerank", "summarize", "translate"]
    fleet = make_fleet(models={"catalog": {"texts": {"path": "fake", "kinds": kinds, "engines": ["fake"]}}})
    fleet.start_worker()
    texts = ("-m", "texts", "--text", "abc", "--text", "de")

    classified = json.loads(muai(fleet, "submit", *texts, "--kind", "classify")[1])
    reranked = json.loads(muai(fleet, "submit", *texts, "--query", "q")[1])

    assert len(classified["labels"]) == len(classified["scores"]) == 2
    assert sorted(reranked["order"]) == [0, 1]
    assert muai(fleet, "submit", *texts, "--kind", "summarize") == (0, "cba\ned\n", "")
    line = {"model": "texts", "kind": "translate", "text": "abc", "max_tokens": 2}
    assert muai(fleet, "submit", "--json", "-", stdin=json.dumps(line)) == (0, "cb\n", "")
    status, _, error = muai(fleet, "submit", *texts, "--kind", "rerank")
    assert (status, error) == (2, "muai: a rerank request needs inputs.query\n")


def test_submit_reads_a_request_from_the_input(fleet):
    """``--json -`` takes the request from the standard input; options add to it."""
    request = json.dumps({"model": "echo", "inputs": {"prompt": "abcdef"}})

    assert muai(fleet, "submit", "--json", "-", "--max-tokens", "2", stdin=request) == (0, "fe\n", "")


def test_a_request_can_be_fetched_later(fleet):
    """``--no-wait`` prints the id; ``muai result`` waits for the answer; cancelling comes too late."""
    status, request_id, _ = muai(fleet, "submit", "-m", "echo", "--prompt", "abc", "--no-wait")

    assert status == 0
    assert muai(fleet, "result", request_id.strip()) == (0, "cba\n", "")
    assert muai(fleet, "cancel", request_id.strip())[0] == 1


def test_a_failed_request_is_one_line(fleet):
    """The request's own error is what the caller sees; what is refused is told from what is not there yet."""
    bad = muai(fleet, "submit", "-m", "echo", "--prompt", "!bad")
    unknown = muai(fleet, "submit", "-m", "nope", "--prompt", "x")
    nothing = muai(fleet, "result", "never-submitted", "--timeout", "0")

    assert bad == (3, "", "muai: the fake engine was told to refuse this request\n")
    assert (unknown[0], unknown[2].count("\n")) == (3, 1)
    assert "no live worker has a model named 'nope'; there are: echo" in unknown[2]
    assert (nothing[0], nothing[2].count("\n")) == (5, 1)


def test_a_waiting_request_can_be_cancelled(make_fleet):
    """A request that nobody has taken yet is cancelled, and its caller is told."""
    fleet = make_fleet()
    request_id = muai(fleet, "submit", "-m", "echo", "--prompt", "x", "--timeout", "600", "--no-wait")[1].strip()

    cancelled = muai(fleet, "cancel", request_id)

    assert cancelled == (0, f"cancelled {request_id}\n", "")
    assert muai(fleet, "result", request_id) == (1, "", "muai: The request was cancelled.\n")


# --- the fleet --------------------------------------------------------------------------------------------------------


def test_status_and_doctor_see_the_worker(fleet):
    """Both name the worker's engine and model; a healthy machine has exit status 0."""
    table = muai(fleet, "status")
    data = json.loads(muai(fleet, "status", "--json")[1])
    doctor = muai(fleet, "doctor")

    assert table[0] == 0
    assert "fake" in table[1]
    assert "echo" in table[1]
    assert "dead letters: 0" in table[1]
    assert data["workers"][0]["engines"][0]["models"]["echo"]["kinds"] == ["generate", "chat", "embed"]
    assert data["queues"]["fake"] == 0
    assert doctor[0] == 0, doctor[1]
    assert "workers: 1 alive, serving echo" in doctor[1]


def test_the_embedded_broker_runs_in_the_foreground(tmp_path):
    """``muai broker`` prints what to paste, serves, and ends cleanly when it is told to."""
    process = subprocess.Popen(
        [sys.executable, "-m", "producer.cli", "broker", "--port", "0", "--directory", str(tmp_path / "data")],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    line = process.stdout.readline().decode()
    url = line.removeprefix("export REDIS_URL=").strip()
    environ = {**os.environ, "REDIS_URL": url, "MUAI_CONFIG": ""}
    status = subprocess.run(
        [sys.executable, "-m", "producer.cli", "status", "--json"], cwd=ROOT, env=environ, capture_output=True,
        timeout=TIMEOUT, check=False,
    )  # fmt: skip

    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=TIMEOUT)

    assert status.returncode == 0
    assert (process.returncode, err) == (0, b"")


# --- batch files ------------------------------------------------------------------------------------------------------


def test_a_file_is_answered_line_by_line(fleet, tmp_path):
    """Each line gets its answer in the input's order; bad lines get errors, and the exit status says so."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [
        '{"prompt": "ab"}',
        "{broken",
        '{"prompt": "!fail"}',
        '{"model": "nope", "prompt": "x"}',
        '{"texts": ["t"]}',
        '{"id": "mine", "prompt": "cd"}',
        '{"prompt": "x", "nope": 1}',
        '{"prompt": "ef"}',
    ]
    source.write_text("\n".join(lines) + "\n\n")

    status, out, err = muai(fleet, "batch", str(source), str(target), "-m", "echo")

    answers = read_answers(target)
    kinds = [answer["error"]["type"] if "error" in answer else "ok" for answer in answers]
    assert (status, out) == (1, "")
    assert [answer["line"] for answer in answers] == list(range(1, 9))
    assert kinds[:2] == ["ok", "BadRequest"]
    assert kinds[3:] == ["UnknownModel", "ok", "ok", "BadRequest", "ok"]
    assert kinds[2] not in ("ok", "BadRequest")
    assert answers[5]["id"] == "mine"
    assert answers[7]["result"]["outputs"]["text"] == "fe"
    assert "8 lines answered, 4 of them with an error" in err
    assert "broken" not in err


def test_a_pipe_in_the_middle(fleet):
    """``-`` reads the standard input and writes the standard output; all fine is exit status 0."""
    status, out, err = muai(fleet, "batch", "-", "-", "-m", "echo", stdin='{"prompt": "ab"}\n{"prompt": "cd"}\n')

    assert status == 0
    assert [json.loads(line)["result"]["outputs"]["text"] for line in out.splitlines()] == ["ba", "dc"]
    assert err.startswith("muai: 2 lines answered; ")


def test_a_second_run_has_nothing_to_do(fleet, tmp_path):
    """What is answered is not run again; a run to another file is a run of its own."""
    source = tmp_path / "in.jsonl"
    prompts = write_prompts(source, 50)
    first, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"

    muai(fleet, "batch", str(source), str(first), "-m", "echo")
    again = muai(fleet, "batch", str(source), str(first), "-m", "echo")
    taken = claims(fleet)
    muai(fleet, "batch", str(source), str(other), "-m", "echo")

    assert again[0] == 0
    assert taken == 50
    assert claims(fleet) == 100
    assert_answered(first, prompts)
    assert_answered(other, prompts)


def test_errors_are_tried_again_when_asked(make_fleet, tmp_path):
    """A plain rerun keeps errors and their exit status; --retry-errors replaces them by new answers."""
    fleet = make_fleet()
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts = write_prompts(source, 3)
    with source.open("a") as stream:
        stream.write('{"id": "mine", "model": "late", "prompt": "prompt 4"}\n')
    worker = fleet.start_worker()
    arguments = ("batch", str(source), str(target), "-m", "echo")

    first = muai(fleet, *arguments)
    plain = muai(fleet, *arguments)
    # The model appears: the worker starts again with another configuration.
    worker.terminate()
    worker.wait(TIMEOUT)
    fleet.config.write_text(fleet.config.read_text().replace("echo:", "late:"))
    fleet.start_worker()
    retried = muai(fleet, *arguments, "--retry-errors")

    assert (first[0], plain[0], retried[0]) == (1, 1, 0)
    assert "1 of them with an error (UnknownModel 1)" in plain[2]
    assert_answered(target, [*prompts, "prompt 4"])


def test_a_killed_run_is_taken_up_and_runs_nothing_twice(make_fleet, tmp_path):
    """After kill -9 and a torn last line the next run answers the rest; answers that the broker has are fetched."""
    fleet = make_fleet(optimization={"fake": {"latency_ms": 20}})
    fleet.start_worker()
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts = write_prompts(source, 1500)
    arguments = ("batch", str(source), str(target), "-m", "echo", "--window", "300")
    process = start(fleet, *arguments)
    eventually(lambda: target.exists() and target.read_bytes().count(b"\n") > 100, what="the first answers")

    process.kill()
    process.communicate()
    settled(fleet)
    with target.open("ab") as stream:
        stream.write(b'{"line":9')
    written = len(read_answers(target))
    status, _, err = muai(fleet, *arguments)

    assert written < 1500
    assert status == 0, err
    assert_answered(target, prompts)
    assert claims(fleet) == 1500


def test_an_interrupted_run_leaves_a_whole_file(make_fleet, tmp_path):
    """Ctrl-C ends with status 130 and says how to go on; so it does."""
    fleet = make_fleet(optimization={"fake": {"latency_ms": 100}})  # it runs for five seconds: the signal is in time
    fleet.start_worker()
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts = write_prompts(source, 1500)
    arguments = ("batch", str(source), str(target), "-m", "echo")
    process = start(fleet, *arguments)
    eventually(lambda: target.exists() and target.read_bytes().count(b"\n") > 50, what="the first answers")

    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=TIMEOUT)
    content = target.read_bytes()

    assert process.returncode == 130
    assert err.startswith(b"muai: stopped: ")
    assert err.count(b"\n") == 1
    assert content.endswith(b"\n")
    assert muai(fleet, *arguments)[0] == 0
    assert_answered(target, prompts)


def test_a_changed_input_is_refused(fleet, tmp_path):
    """Answers of another input are not mixed with this one's."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_prompts(source, 3)
    arguments = ("batch", str(source), str(target), "-m", "echo")
    muai(fleet, *arguments)
    before = target.read_bytes()
    source.write_text(source.read_text().replace("prompt 2", "prompt two"))

    status, _, err = muai(fleet, *arguments)

    assert (status, err.count("\n")) == (2, 1)
    assert "line 2 has another content than when it was answered" in err
    assert target.read_bytes() == before


def test_without_a_worker_nothing_is_written_off(make_fleet, tmp_path):
    """An empty fleet is an error of the run, not of every line."""
    fleet = make_fleet()
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_prompts(source, 3)

    status, _, err = muai(fleet, "batch", str(source), str(target), "-m", "echo")

    assert status == 3
    assert "no worker is alive" in err
    assert target.read_bytes() == b""


def test_a_deadline_ends_lines_that_nobody_takes(fleet, tmp_path):
    """When the last worker dies, --timeout still ends the run: what was under way gets an error, none is left out."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_prompts(source, 3)
    fleet.processes[0].send_signal(signal.SIGSTOP)

    status, _, err = muai(fleet, "batch", str(source), str(target), "-m", "echo", "--timeout", "0.5")
    fleet.processes[0].send_signal(signal.SIGCONT)

    assert status == 1, err
    assert [answer["error"]["type"] for answer in read_answers(target)] == ["DeadlineExceeded"] * 3


def test_a_lost_broker_stops_the_run_and_not_the_file(tmp_path):
    """When the broker dies the run ends with status 4; once it is back, the same command finishes the file."""
    config = tmp_path / "fleet.yaml"
    config.write_text(
        "optimization: {engine_preference: [fake], fake: {latency_ms: 20}}\n"
        "models: {catalog: {echo: {path: fake, kinds: [generate], engines: [fake]}}}\n"
    )
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts = write_prompts(source, 1500)
    arguments = ("batch", str(source), str(target), "-m", "echo")
    with EmbeddedBroker(tmp_path / "broker", append_only=True) as broker:
        fleet = FleetUnderTest(broker.url, tmp_path, config)
        try:
            fleet.start_worker()
            process = start(fleet, *arguments)
            eventually(lambda: target.exists() and target.read_bytes().count(b"\n") > 50, what="the first answers")

            broker.kill()
            _, err = process.communicate(timeout=TIMEOUT)
            broker.start()
            eventually(fleet.client.fleet, what="the worker's return")
            status, _, after = muai(fleet, *arguments)
        finally:
            fleet.stop()

    lines = err.decode().splitlines()
    assert process.returncode == 4
    assert any("run the same command again to go on" in line for line in lines)
    assert "does not answer" in lines[-1]
    assert "Traceback" not in err.decode()
    assert status == 0, after
    assert_answered(target, prompts)


@pytest.mark.parametrize("count", [5000])
def test_a_large_file_takes_little_memory(fleet, tmp_path, count):
    """What is under way is bounded, so is the memory: 5,000 lines of 4 kB in under 200 MB."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    with source.open("w") as stream:
        for number in range(count):
            stream.write(json.dumps({"prompt": f"{number} " + "x" * 4000, "max_tokens": 8}) + "\n")

    process = start(fleet, "batch", str(source), str(target), "-m", "echo", stderr=subprocess.DEVNULL)
    peak = 0
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:  # the kernel keeps the peak of this very program; that of wait4 begins before exec
        with suppress(OSError, StopIteration, ProcessLookupError):
            peak = int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1])
        time.sleep(0.05)
    process.stdout.close()

    assert process.returncode == 0
    assert Counter(answer["line"] for answer in read_answers(target)) == Counter(range(1, count + 1))
    assert 0 < peak < 200_000
