"""``muai`` between other programs: prompts from pipes, batches through pipes and compressed files, exit statuses."""

import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

from shared import keys
from tests.support.fleet import ROOT
from tests.support.shell import TIMEOUT, muai, start
from tests.support.waiting import eventually


def texts(content: bytes) -> list[str]:
    """The answers' texts."""
    return [json.loads(line)["result"]["outputs"]["text"] for line in content.splitlines()]


def prompts(count: int) -> bytes:
    """That many lines."""
    return b"".join(b'{"prompt": "prompt %d"}\n' % number for number in range(count))


def test_submit_reads_a_prompt_from_a_pipe(fleet):
    """Where no input is given, where it is ``-``, and in the place of a prompt."""
    for arguments in ((), ("-",), ("--prompt", "-")):
        assert muai(fleet, "submit", "-m", "echo", *arguments, stdin="abc\n") == (0, "cba\n", "")
    assert muai(fleet, "submit", "-m", "echo", "abc", stdin="not this") == (0, "cba\n", "")
    assert muai(fleet, "submit", "-m", "echo", "--kind", "chat", stdin="abc\n") == (0, "cba\n", "")


def test_statuses_tell_how_it_went(make_fleet):
    """Failure, refusal and an answer that is not there yet; usage and outage need no fleet."""
    fleet = make_fleet()
    waiting = muai(fleet, "submit", "-m", "echo", "--prompt", "x", "--timeout", "600", "--no-wait")[1].strip()

    assert muai(fleet, "submit", "-m", "echo", "--prompt", "x")[0] == 3
    assert muai(fleet, "result", waiting, "--timeout", "0")[0] == 5
    assert muai(fleet, "submit", "-m", "echo", "--prompt", "x", "--timeout", "0.2")[0] == 1

    fleet.start_worker()
    assert muai(fleet, "submit", "-m", "echo", "--prompt", "!bad")[0] == 3
    assert muai(fleet, "submit", "-m", "echo", "--prompt", "!fail")[0] == 1
    assert muai(fleet, "submit", "-m", "nope", "--prompt", "x")[0] == 3


def test_a_batch_goes_through_compressed_files(fleet, tmp_path):
    """From gzip to gzip; the second run has nothing to do."""
    source, target = tmp_path / "in.jsonl.gz", tmp_path / "out.jsonl.gz"
    source.write_bytes(gzip.compress(prompts(30)[:200]) + gzip.compress(prompts(30)[200:]))
    arguments = ("batch", str(source), str(target), "-m", "echo")

    first, again = muai(fleet, *arguments), muai(fleet, *arguments)

    assert (first[0], again[0]) == (0, 0)
    assert texts(gzip.decompress(target.read_bytes())) == [f"prompt {number}"[::-1] for number in range(30)]
    assert int(fleet.client._redis.get(keys.LEASE_COUNTER)) == 30


def test_a_killed_run_to_a_compressed_file_is_taken_up(make_fleet, tmp_path):
    """After kill -9 what was written is there, and the next run writes the rest."""
    fleet = make_fleet(optimization={"fake": {"latency_ms": 20}})
    fleet.start_worker()
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl.gz"
    source.write_bytes(prompts(1500))
    arguments = ("batch", str(source), str(target), "-m", "echo", "--window", "300")
    process = start(fleet, *arguments)
    eventually(lambda: target.exists() and target.stat().st_size > 5000, what="the first answers")

    process.kill()
    process.communicate()
    status, _, err = muai(fleet, *arguments)

    assert status == 0, err
    assert "by an earlier run" in err
    assert texts(gzip.decompress(target.read_bytes())) == [f"prompt {number}"[::-1] for number in range(1500)]


def test_a_damaged_input_is_answered_up_to_there(fleet, tmp_path):
    """The lines before are answered; the run says where the file ends, in a line."""
    source, target = tmp_path / "in.jsonl.gz", tmp_path / "out.jsonl"
    source.write_bytes(gzip.compress(prompts(2000))[:-100])

    status, _, err = muai(fleet, "batch", str(source), str(target), "-m", "echo")

    answered = len(target.read_bytes().splitlines())
    assert status == 2
    assert 0 < answered < 2000
    assert err.splitlines()[-1] == f"muai: {source}: the file is cut off after line {answered}"


def test_a_batch_writes_into_pipes(fleet, tmp_path):
    """Into a FIFO that a program reads, and into ``/dev/stdout``, a pipe or a file."""
    source, fifo = tmp_path / "in.jsonl", tmp_path / "fifo"
    source.write_bytes(prompts(3))
    os.mkfifo(fifo)
    got = []
    reader = threading.Thread(target=lambda: got.append(fifo.read_bytes()))
    reader.start()

    into_fifo = muai(fleet, "batch", str(source), str(fifo), "-m", "echo")
    reader.join(TIMEOUT)
    into_pipe = muai(fleet, "batch", "/dev/stdin", "/dev/stdout", "-m", "echo", stdin=prompts(3).decode())
    with (tmp_path / "out").open("wb") as out:
        into_file = start(fleet, "batch", str(source), "/dev/stdout", "-m", "echo", stdout=out)
        into_file.communicate(timeout=TIMEOUT)

    answers = [f"prompt {number}"[::-1] for number in range(3)]
    assert (into_fifo[0], into_pipe[0], into_file.returncode) == (0, 0, 0)
    assert texts(got[0]) == texts(into_pipe[1].encode()) == texts((tmp_path / "out").read_bytes()) == answers


def test_a_reader_that_has_gone_ends_the_run_quietly(fleet, tmp_path):
    """``| head`` is no error to be told of."""
    source = tmp_path / "in.jsonl"
    source.write_bytes(prompts(500))
    process = start(fleet, "batch", str(source), "-", "-m", "echo")
    process.stdout.readline()
    process.stdout.close()

    err = process.stderr.read().decode()

    assert process.wait(TIMEOUT) == 1
    assert "Traceback" not in err
    assert "Broken pipe" not in err


def test_a_full_disk_is_named(fleet, tmp_path):
    """The line says which file; with room again the same command goes on."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(prompts(50))
    arguments = ("batch", str(source), str(target), "-m", "echo")

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))

    process = start(fleet, *arguments, preexec_fn=full)
    _, err = process.communicate(timeout=TIMEOUT)
    device = muai(fleet, "batch", str(source), "/dev/full", "-m", "echo")
    with Path("/dev/full").open("wb") as nowhere:
        printed = start(fleet, "status", stdout=nowhere)
        said = printed.communicate(timeout=TIMEOUT)[1].decode()
    again = muai(fleet, *arguments)

    assert process.returncode == 1
    assert err.decode().splitlines()[-1] == f"muai: {target}: File too large"
    assert device[0] == 1
    assert device[2].splitlines()[-1] == "muai: /dev/full: No space left on device"
    assert (printed.returncode, said) == (1, "muai: the standard output: No space left on device\n")
    assert again[0] == 0, again[2]
    assert texts(target.read_bytes()) == [f"prompt {number}"[::-1] for number in range(50)]


def test_a_worker_with_a_wrong_configuration_says_one_line(fleet):
    """What is wrong, without how Celery came to ask; so does every command of Celery's."""
    environ = {**fleet.environ, "MUAI_OPT_BATCHER_MAX_SIZ": "7"}
    for command in (("worker", "-Q", "fake"), ("beat",), ("inspect", "ping")):
        process = subprocess.run(
            [sys.executable, "-m", "celery", "-A", "workers", *command], cwd=ROOT, env=environ, capture_output=True,
            timeout=TIMEOUT, check=False,
        )  # fmt: skip

        assert process.returncode == 64
        assert process.stdout == b""
        assert process.stderr.decode().startswith("Error: MUAI_OPT_BATCHER_MAX_SIZ: no such variable")
        assert process.stderr.count(b"\n") == 1


def test_an_interrupted_run_leaves_a_whole_compressed_file(make_fleet, tmp_path):
    """Ctrl-C writes the end of the frame: other programs read the file without complaint."""
    fleet = make_fleet(optimization={"fake": {"latency_ms": 100}})
    fleet.start_worker()
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl.gz"
    source.write_bytes(prompts(1500))
    process = start(fleet, "batch", str(source), str(target), "-m", "echo")
    eventually(lambda: target.exists() and target.stat().st_size > 2000, what="the first answers")

    process.send_signal(signal.SIGINT)
    process.communicate(timeout=TIMEOUT)

    assert process.returncode == 130
    assert subprocess.run(["gzip", "-t", str(target)], check=False).returncode == 0
