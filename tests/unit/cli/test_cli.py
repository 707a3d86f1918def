"""The command line where no broker is needed: its errors, the configuration, the doctor's judgement."""

import errno
import logging
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from producer.batch.run import AnswerFile, Summary
from producer.cli import main as cli
from producer.cli.exits import Exit, exit_of, exit_of_answer
from producer.cli.inputs import input_of
from producer.doctor import broker, machine
from producer.doctor.examine import examine
from shared import errors
from shared.contract import EngineName, Kind
from shared.errors import BadRequest, ConfigurationError
from shared.findings import Grade
from shared.registry import EngineInfo, ServedModel, WorkerInfo
from shared.settings import ModelSpec, ModelsSettings, Settings


@pytest.fixture
def muai(monkeypatch, capsys, caplog, tmp_path):
    """Run a command in an empty directory: ``(exit status, output, error output)``."""
    monkeypatch.chdir(tmp_path)
    for name in ("MUAI_CONFIG", "REDIS_URL"):
        monkeypatch.delenv(name, raising=False)
    caplog.set_level(logging.NOTSET, "producer.client.replies")  # the command changes it: it is put back afterwards

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["muai", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


NOWHERE = ("--redis-url", "redis://127.0.0.1:1/0")


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("submit", "--model", "m"), "muai: inputs: Field required"),
        (("submit", "x", "--prompt", "y"), "muai: INPUT, --prompt, --text and --message are one thing: give one"),
        (("submit", "--prompt", "y", "--text", "z"), "muai: INPUT, --prompt, --text and --message are one thing"),
        (("submit", "--prompt", "-", "--message", "user:z"), "muai: INPUT, --prompt, --text and --message are one"),
        (("submit", "--prompt", "x"), "muai: model: Field required"),
        (("submit", "-m", "m", "--message", "hello"), "muai: --message 'hello': write it as role:content"),
        (("submit", "-m", "m", "--message", "dog: hi"), "muai: inputs.messages.0.role: Input should be 'system', "),
        (
            ("submit", "-m", "m", "--prompt", "x", "--max-tokens", "0"),
            "muai: params.max_tokens: Input should be greater",
        ),
        (("submit", "--json", "absent.json"), "muai: absent.json: No such file or directory"),
        (("status", "--redis-url", "redis://:pa/ss@h"), "muai: fleet.redis_url: 'redis://:***@h' cannot be read"),
        (("status", "--config", "absent.yaml"), "muai: absent.yaml: cannot be read: No such file or directory"),
        (("batch", "absent.jsonl", "out.jsonl"), "muai: absent.jsonl: No such file or directory"),
        (("batch", "same", "same"), "muai: IN and OUT are the same file"),
    ],
)
def test_errors_are_one_line(muai, arguments, message):
    """Whatever is wrong is said in one line without a traceback, and the exit status is 2."""
    status, out, err = muai(*arguments)

    assert status == 2
    assert out == ""
    assert err.startswith(message)
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("submit", "-m", "m", "--prompt", "x"), "muai: cannot list the workers: the broker at redis://"),
        (("status",), "muai: cannot list the workers: the broker at redis://127.0.0.1:1/0 does not answer"),
        (("result", "x"), "muai: cannot look up a result"),
        (("cancel", "x"), "muai: cannot cancel"),
        (("dead", "list"), "muai: cannot"),
    ],
)
def test_an_outage_is_told_from_wrong_use(muai, arguments, message):
    """A broker that does not answer is a line too, with a status of its own: the same again may do."""
    status, out, err = muai(*arguments, *NOWHERE)

    assert (status, out) == (4, "")
    assert err.startswith(message)
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.EngineError(), Exit.FAILED),
        (errors.DeadlineExceeded(), Exit.FAILED),
        (errors.Cancelled(), Exit.FAILED),
        (errors.BadRequest(), Exit.USAGE),
        (errors.ConfigurationError(), Exit.USAGE),
        (errors.MissingDependency(), Exit.USAGE),
        (FileNotFoundError(2, "no such file", "x"), Exit.USAGE),
        (errors.NoEngineAvailable(), Exit.REFUSED),
        (errors.QueueFull(), Exit.REFUSED),
        (errors.QuotaExceeded(), Exit.REFUSED),
        (errors.UnknownModel(), Exit.REFUSED),
        (errors.PayloadTooLarge(), Exit.REFUSED),
        (errors.IdConflict(), Exit.REFUSED),
        (errors.BrokerRefused(), Exit.REFUSED),
        (errors.BrokerUnavailable(), Exit.OUTAGE),
        (errors.BrokerFull(), Exit.OUTAGE),
        (TimeoutError("no result yet"), Exit.NO_ANSWER),
        (OSError(errno.ENOSPC, "full", "x"), Exit.FAILED),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_the_status_tells_what_to_do(error, status):
    """Mend the call, mend the request, come back later, or look."""
    assert exit_of(error) is status


def test_what_a_worker_refuses_is_not_wrong_use():
    """A request that was submitted is not told like one that was not."""
    assert exit_of_answer(errors.BadRequest()) is Exit.REFUSED
    assert exit_of_answer(errors.EngineError()) is Exit.FAILED


def test_the_statuses_are_documented():
    """Each has its row."""
    page = (Path(__file__).parents[3] / "docs" / "command-line.md").read_text(encoding="utf-8")

    rows = re.findall(r"^\| (\d+) \| ([a-z ]+) \|", page, re.MULTILINE)

    assert {int(number): name.replace(" ", "_") for number, name in rows} == {
        status.value: status.name.lower() for status in Exit
    }


def test_the_version_is_told(muai):
    """``--version`` prints it and ends well."""
    assert muai("--version") == (0, f"muai {metadata.version('muai-fleet')}\n", "")


@pytest.mark.parametrize(
    ("options", "inputs"),
    [
        ({}, {"prompt": "two\nlines"}),
        ({"kind": Kind.CHAT}, {"messages": [{"role": "user", "content": "two\nlines"}]}),
        ({"kind": Kind.SUMMARIZE}, {"texts": ["two\nlines"]}),
        ({"query": "q"}, {"texts": ["two\nlines"]}),
        ({"prompt": "x"}, {}),
        ({"prompt": "-"}, {"prompt": "two\nlines"}),
    ],
)
def test_what_is_piped_in_becomes_what_the_kind_takes(monkeypatch, tmp_path, options, inputs):
    """Where no input is given; its last line break is left out."""
    (tmp_path / "in").write_bytes(b"two\nlines\n")
    with (tmp_path / "in").open() as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        given = input_of(None, options)

    assert given == inputs


def test_text_that_is_not_utf8_is_refused(monkeypatch, tmp_path):
    """One line says where."""
    (tmp_path / "in").write_bytes(b"ab\xff")
    with (tmp_path / "in").open() as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        with pytest.raises(BadRequest, match="the standard input is not UTF-8 text \\(byte 2\\)"):
            input_of("-", {})


@pytest.mark.parametrize("arguments", [("submit", "--engine", "vlm"), ("batch",), ("nope",), ("submit", "--nope")])
def test_wrong_use_is_status_two(muai, arguments):
    """What the command line itself refuses has the same exit status."""
    status, out, err = muai(*arguments)

    assert status == 2
    assert "Traceback" not in err
    assert out == ""


def test_a_request_file_that_is_not_json_is_refused(muai, tmp_path):
    """The error says where, never what the file holds."""
    (tmp_path / "r.json").write_text('{\n"prompt": secret}')

    status, _, err = muai("submit", "--json", "r.json")

    assert (status, err.count("\n")) == (2, 1)
    assert "r.json is not JSON" in err
    assert "secret" not in err


# --- configuration ------------------------------------------------------------------------------------------------


def test_config_prints_what_counts_without_secrets(muai, monkeypatch):
    """The output is YAML that holds every option; passwords are masked."""
    monkeypatch.setenv("MUAI_OPT_BATCHER_MAX_SIZE", "7")

    status, out, _ = muai("config", "--redis-url", "redis://:hunter2@h:1/0")

    settings = yaml.safe_load(out)
    assert status == 0
    assert settings["optimization"]["batcher"]["max_batch_size"] == 7
    assert settings["fleet"]["redis_url"] == "redis://:***@h:1/0"
    assert "hunter2" not in out


def test_a_wrong_variable_stops_every_command(muai, monkeypatch):
    """A mistyped variable is never passed over."""
    monkeypatch.setenv("MUAI_OPT_BATCHER_MAX_SIZ", "7")

    status, _, err = muai("status")

    assert status == 2
    assert "did you mean MUAI_OPT_BATCHER_MAX_SIZE?" in err


# --- the doctor ---------------------------------------------------------------------------------------------------


def test_the_doctor_reports_a_wrong_configuration(muai, tmp_path):
    """Each problem of the configuration is a failed check; what does not depend on it is still checked."""
    (tmp_path / "c.yaml").write_text("fleet: {lease_second: 1, max_deliveries: 0}")

    status, out, _ = muai("doctor", "--config", "c.yaml")

    assert status == 1
    assert out.count("fail configuration: ") == 2
    assert "ok   python: " in out


def test_the_doctor_fails_without_a_broker(muai):
    """A broker that does not answer is a failure with the command that starts one."""
    status, out, _ = muai("doctor", *NOWHERE)

    assert status == 1
    assert "fail broker: redis://127.0.0.1:1/0 does not answer" in out
    assert "-> muai broker" in out


def test_an_old_python_is_a_failure():
    """The oldest version that works is 3.11."""
    assert machine.check_python((3, 10, 14)).grade is Grade.FAIL
    assert machine.check_python((3, 11, 0)).grade is Grade.OK


def test_packages_that_exclude_each_other_are_failures():
    """Two builds of one import package, and the exporter of another project, are found by their distributions."""
    versions = {"onnxruntime": "1.31", "onnxruntime-gpu": "1.31", "celery-exporter": "1.5.1"}

    findings = list(machine.check_conflicts(versions.get))

    assert [finding.grade for finding in findings] == [Grade.FAIL, Grade.FAIL]
    assert "onnxruntime-gpu are both installed" in findings[0].detail
    assert findings[1].remedy.startswith("pip uninstall -y celery-exporter")
    assert list(machine.check_conflicts({"onnxruntime": "1.31"}.get)) == []


def test_an_engine_that_is_switched_off_needs_nothing():
    """Only what the configuration wants is asked for."""
    settings = Settings.model_validate({"optimization": {"vllm": {"enabled": False}}})

    found = {finding.subject: finding for finding in machine.check_engines(settings, {}.get)}

    assert found["engine vllm"].detail == "switched off in the configuration"


def test_models_are_looked_for(tmp_path):
    """A folder with a model, one without, one that is not there, a hub id, and the fake engine's."""
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    specs = {
        "good": ModelSpec(path=str(tmp_path / "good")),
        "empty": ModelSpec(path=str(tmp_path / "empty")),
        "absent": ModelSpec(path=str(tmp_path / "absent")),
        "fake": ModelSpec(path="nowhere", engines=(EngineName.FAKE,)),
    }

    findings = list(machine.check_models(Settings(models=ModelsSettings(catalog=specs))))

    assert [finding.grade for finding in findings] == [Grade.OK, Grade.FAIL, Grade.FAIL, Grade.OK]
    assert [finding.grade for finding in machine.check_models(Settings())] == [Grade.WARN]


def test_a_model_on_a_hub_needs_the_hub(monkeypatch):
    """Offline, a hub id is a warning."""
    settings = Settings(models=ModelsSettings(catalog={"m": ModelSpec(path="org/model")}))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    online = [finding.grade for finding in machine.check_models(settings)]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    assert online == [Grade.OK]
    assert [finding.grade for finding in machine.check_models(settings)] == [Grade.WARN]


def test_the_disk_is_judged_where_models_will_be(tmp_path):
    """A folder that is not there yet is judged by the one it will be made in."""
    finding = machine.check_disk(tmp_path / "not" / "yet")

    assert str(tmp_path) in finding.detail


@pytest.mark.parametrize(
    ("info", "grade"),
    [
        ({"redis_version": "6.0.16"}, Grade.FAIL),
        ({"redis_version": "6.2.0"}, Grade.OK),
        ({"redis_version": "7.2.4", "valkey_version": "9.1.2"}, Grade.OK),
    ],
)
def test_old_brokers_are_refused(info, grade):
    """The scripts need commands of Redis 6.2."""
    assert broker.check_version(info, "redis://h").grade is grade


@pytest.mark.parametrize(
    ("info", "grade"),
    [
        ({"maxmemory_policy": "noeviction", "maxmemory": 0}, Grade.OK),
        ({"maxmemory_policy": "noeviction", "maxmemory": 10**9}, Grade.OK),
        ({"maxmemory_policy": "allkeys-lru", "maxmemory": 0}, Grade.WARN),
        ({"maxmemory_policy": "allkeys-lru", "maxmemory": 10**9}, Grade.FAIL),
    ],
)
def test_a_broker_that_drops_requests_is_a_failure(info, grade):
    """Eviction with a limit loses requests; without a limit it only might one day."""
    finding = broker.check_eviction(info)

    assert finding.grade is grade
    assert (finding.remedy == "") == (grade is Grade.OK)


@pytest.mark.parametrize(
    ("info", "grade"),
    [
        ({"aof_enabled": 1, "aof_last_write_status": "ok"}, Grade.OK),
        ({"aof_enabled": 1, "aof_last_write_status": "err"}, Grade.FAIL),
        ({"aof_enabled": 0}, Grade.WARN),
    ],
)
def test_persistence_is_judged(info, grade):
    """Without an append-only file what waits is lost with the broker; one that cannot be written is worse."""
    assert broker.check_persistence(info).grade is grade


def test_workers_are_compared_with_the_catalogue():
    """No worker, a declared model that nobody serves, and one that could not be loaded are each a warning."""
    settings = Settings(models=ModelsSettings(catalog={"a": ModelSpec(path="x"), "b": ModelSpec(path="x")}))
    engine = EngineInfo(
        name=EngineName.FAKE, models={"a": ServedModel(kinds=(Kind.GENERATE,))}, failed={"b": "no such file"}
    )
    worker = WorkerInfo(id="w", host="h", pid=1, started=0.0, queues=("fake",), engines=(engine,))

    nobody = broker.check_workers([], settings)
    partly = broker.check_workers([worker], settings)

    assert (nobody.grade, nobody.remedy) == (Grade.WARN, "celery -A workers worker -Q pytorch")
    assert partly.grade is Grade.WARN
    assert "nobody serves b; could not be loaded: b (no such file)" in partly.detail


def test_the_doctor_survives_what_it_examines():
    """With settings that could not be loaded the other checks still come out."""
    findings = list(examine(ConfigurationError("a: wrong\nb: wrong")))

    assert [finding.detail for finding in findings if finding.subject == "configuration"] == ["a: wrong", "b: wrong"]


# --- answer files -------------------------------------------------------------------------------------------------


def test_a_torn_end_is_cut_off(tmp_path):
    """What a crash left behind the last whole line goes; what is appended follows the whole lines."""
    path = tmp_path / "out.jsonl"
    path.write_bytes(b'{"line": 1, "id": "a", "result": {}}\n{"line": 2, "id": "b", "res')

    output = AnswerFile(path)
    output.append(b'{"line": 2}\n')
    output.close()

    assert output.answers.count == 1
    assert path.read_bytes() == b'{"line": 1, "id": "a", "result": {}}\n{"line": 2}\n'


def test_a_last_line_without_its_newline_is_kept(tmp_path):
    """Only the newline is missing: it is added."""
    path = tmp_path / "out.jsonl"
    path.write_bytes(b'{"line": 1, "id": "a", "result": {}}')

    output = AnswerFile(path)
    output.append(b'{"line": 2}\n')
    output.close()

    assert path.read_bytes() == b'{"line": 1, "id": "a", "result": {}}\n{"line": 2}\n'


def test_errors_leave_the_file_in_one_step(tmp_path):
    """With errors to be tried again the file is replaced by one without them; no draft stays behind."""
    path = tmp_path / "out.jsonl"
    path.write_bytes(b'{"line": 1, "id": "a", "error": {"type": "X"}}\n{"line": 2, "id": "b", "result": {}}\n')

    output = AnswerFile(path, drop_errors=True)
    output.close()

    assert path.read_bytes() == b'{"line": 2, "id": "b", "result": {}}\n'
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("drop_errors", [False, True])
def test_a_file_of_another_kind_is_left_alone(tmp_path, drop_errors):
    """A wrong name on the command line destroys nothing."""
    path = tmp_path / "precious.txt"
    path.write_text("one\ntwo\n")

    with pytest.raises(BadRequest, match=r"precious\.txt: line 1 is not JSON; it was not written by muai batch"):
        AnswerFile(path, drop_errors=drop_errors)

    assert path.read_text() == "one\ntwo\n"
    assert list(tmp_path.iterdir()) == [path]


def test_two_runs_do_not_write_to_one_file(tmp_path):
    """The second one is refused while the first one lives."""
    path = tmp_path / "out.jsonl"
    first = AnswerFile(path)

    with pytest.raises(BadRequest, match="another process writes to it"):
        AnswerFile(path)

    first.close()
    AnswerFile(path).close()


def test_the_summary_counts_both_runs():
    """Errors of an earlier run count, for they are in the file."""
    summary = Summary(answered=10, earlier=5, seconds=2.0)
    summary.errors["BadRequest"] = 3

    assert str(summary) == (
        "15 lines answered, 3 of them with an error (BadRequest 3); 5 by an earlier run; 2.0 s, 5 lines/s"
    )


def test_the_command_is_installed():
    """The entry point in the packaging names this module."""
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")

    assert 'muai = "producer.cli.main:main"' in text
