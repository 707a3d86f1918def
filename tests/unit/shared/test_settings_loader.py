"""Where settings come from, and what is said of wrong ones."""

from pathlib import Path

import pytest

from shared.contract import EngineName, Kind
from shared.errors import ConfigurationError
from shared.settings import Settings
from shared.settings_loader import configuration_file, load_settings

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a YAML file into an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "settings.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def problems(path: Path | None, environ: dict[str, str] | None = None) -> list[str]:
    """The lines of the error that loading gives."""
    with pytest.raises(ConfigurationError) as caught:
        load_settings(path, environ or {})
    return caught.value.message.splitlines()


def test_no_file_and_no_variables_are_the_defaults(tmp_path, monkeypatch):
    """In a directory without a configuration the defaults count."""
    monkeypatch.chdir(tmp_path)

    assert load_settings(None, {}) == Settings()


def test_the_file_in_config_is_found_by_itself(write):
    """``config/optimization.yaml`` in the current directory is read without being named."""
    write("fleet: {max_deliveries: 7}", "config/optimization.yaml")

    assert configuration_file(None, {}) == Path("config/optimization.yaml")
    assert load_settings(None, {}).fleet.max_deliveries == 7


def test_a_named_file_counts_before_muai_config_and_that_before_the_default(write):
    """The argument wins over ``MUAI_CONFIG``, which wins over ``config/optimization.yaml``."""
    write("fleet: {max_deliveries: 5}", "config/optimization.yaml")
    by_variable = write("fleet: {max_deliveries: 6}", "b.yaml")
    by_argument = write("fleet: {max_deliveries: 7}", "c.yaml")

    assert load_settings(None, {"MUAI_CONFIG": str(by_variable)}).fleet.max_deliveries == 6
    assert load_settings(by_argument, {"MUAI_CONFIG": str(by_variable)}).fleet.max_deliveries == 7


@pytest.mark.parametrize("environ", [{}, {"MUAI_CONFIG": "absent.yaml"}])
def test_a_named_file_that_is_not_there_is_an_error(tmp_path, environ):
    """A file that somebody named must be there, however it was named."""
    path = None if environ else tmp_path / "absent.yaml"

    assert problems(path, environ) == [f"{path or 'absent.yaml'}: cannot be read: No such file or directory"]


@pytest.mark.parametrize("text", ["", "# only a comment\n", "optimization:\n  vllm:\nmodels:\n  catalog:\n"])
def test_empty_files_and_sections_set_nothing(write, text):
    """A section whose keys are all commented out is the same as no section."""
    assert load_settings(write(text), {}) == Settings()


def test_the_older_inline_form_loads(write):
    """``models: {cache_dir, max_cached}`` beside optimization and monitoring in ``config/system.yaml``."""
    text = """
        models:
          cache_dir: "./models"
          max_cached: 3
        optimization:
          enabled: true
          vllm: {enabled: true, tensor_parallel_size: 2}
          deepspeed: {enabled: false}
          onnx: {enabled: true}
        monitoring:
          prometheus: {enabled: true, port: 9090}
          tracing: {enabled: true, endpoint: "http://localhost:4317"}
    """

    settings = load_settings(write(text, "config/system.yaml"), {})

    assert settings.optimization.vllm.tensor_parallel_size == 2
    assert not settings.optimization.engine_enabled(EngineName.DEEPSPEED)


def test_scientific_notation_is_a_number(write):
    """``1e-4`` is the number it looks like."""
    settings = load_settings(write("optimization: {onnx: {validation_tolerance: 1e-4}}"), {})

    assert settings.optimization.onnx.validation_tolerance == 0.0001


def test_model_paths_are_relative_to_the_file(write, tmp_path):
    """What is beside the file is a path, what is not is a hub id, and a leading dot always means a path."""
    (tmp_path / "conf" / "here").mkdir(parents=True)
    path = write(
        """
        models:
          catalog:
            local: {path: here}
            hub: {path: org/model, kinds: [embed]}
            absent: {path: ../not/there}
        """,
        "conf/s.yaml",
    )

    catalog = load_settings(path, {}).models.catalog

    assert catalog["local"].path == str(tmp_path / "conf" / "here")
    assert catalog["hub"].path == "org/model"
    assert catalog["hub"].kinds == (Kind.EMBED,)
    assert catalog["absent"].path == str(tmp_path / "not" / "there")


def test_a_catalogue_in_the_environment_replaces_the_files(write, tmp_path):
    """``MUAI_MODELS_CATALOG`` is a JSON object; its paths are relative to the current directory."""
    (tmp_path / "weights").mkdir()
    path = write("models: {catalog: {a: {path: x}}}", "conf/s.yaml")

    catalog = load_settings(path, {"MUAI_MODELS_CATALOG": '{"b": {"path": "weights"}}'}).models.catalog

    assert {name: spec.path for name, spec in catalog.items()} == {"b": str(tmp_path / "weights")}


# --- what is wrong ------------------------------------------------------------------------------------------------


# Requirements: 14.3
def test_every_problem_is_reported_at_once(write):
    """Problems of the file and of the environment are one error, a line each."""
    path = write("optimization:\n  vllm:\n    dtype: fp8\nfleet:\n  lease_seconds: 0\n")

    lines = problems(path, {"MUAI_MON_SERVER_PORT": "99999", "MUAI_NOPE": "1"})

    assert len(lines) == 4
    assert lines[0] == "MUAI_NOPE: no such variable (its value: '1'); docs/configuration.md lists them all"
    assert lines[1].startswith(f"{path}, line 3: optimization.vllm.dtype: 'fp8' is not allowed; allowed: one of auto, ")
    assert lines[2] == (
        "MUAI_MON_SERVER_PORT: monitoring.server.port: 99999 is not allowed; "
        "allowed: a whole number, at least 0 and at most 65535"
    )
    assert lines[3] == f"{path}, line 5: fleet.lease_seconds: 0 is not allowed; allowed: a number, above 0"


# Requirements: 14.3
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optimization: {vllm: {tensor_paralel_size: 2}}", "did you mean tensor_parallel_size?"),
        ("optimisation: {}", "allowed: optimization, monitoring, models, fleet; did you mean optimization?"),
        ("optimization: {max_batch_size: 2}", "did you mean optimization.batcher.max_batch_size?"),
        ("models: {catalog: {a: {path: x, kind: chat}}}", "did you mean kinds?"),
        ("optimization: {engine_preference: [vlm]}", "did you mean vllm?"),
        ("models: {catalog: {a: {path: x, options: {vlm: {}}}}}", "unknown name 'vlm'"),
    ],
)
def test_the_nearest_right_name_is_offered(write, text, expected):
    """A mistyped key or word is answered with the one that was probably meant."""
    (line,) = problems(write(text))

    assert expected in line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fleet: {max_deliveries: '3'}", "fleet.max_deliveries: '3' is not allowed; allowed: a whole number"),
        ("fleet: {max_deliveries: true}", "fleet.max_deliveries: True is not allowed; allowed: a whole number"),
        ("fleet: {max_deliveries: 2.5}", "fleet.max_deliveries: 2.5 is not allowed; allowed: a whole number"),
        ("fleet: {lease_seconds: .nan}", "fleet.lease_seconds: nan is not allowed"),
        ("fleet: {lease_seconds: null}", "fleet.lease_seconds: null is not allowed"),
        ("fleet: {send_events: 1}", "fleet.send_events: 1 is not allowed; allowed: true or false"),
        ("fleet: {redis_url: localhost}", "allowed: a URL that begins with redis://"),
        ("optimization: {engine_preference: vllm}", "'vllm' is not allowed; allowed: a list that is not empty"),
        ("optimization: {engine_preference: []}", "[] is not allowed; allowed: a list that is not empty"),
        ("optimization: {engine_preference: [onnx, onnx]}", "engine_preference names an engine twice"),
        ("optimization: {vllm: 3}", "optimization.vllm: 3 is not allowed; allowed: a section with the keys enabled"),
        ("optimization: {batcher: {min_batch_size: 99}}", "min_batch_size (99) is above max_batch_size (32)"),
        ("models: {catalog: {a: {}}}", "models.catalog.a.path: is missing"),
        ("models: {catalog: {a: {path: x, name: b}}}", "catalog.a says its name is 'b'"),
        ("monitoring: {anomaly: {alert_destinations: [webhook]}}", "webhook_url is not set"),
        ("monitoring: {server: {preload_models: [a]}}", "line 1: monitoring.server.preload_models names 'a'"),
        ("monitoring: {server: {preload_models: [a]", "line 1: not valid YAML"),
        ("fleet:\n\tlease_seconds: 1", "line 2: not valid YAML: found character '\\t'"),
        ("fleet: {a: !!python/object:os.x {}}", "not valid YAML: could not determine a constructor"),
        ("fleet: {sweep_seconds: 1, sweep_seconds: 2}", "fleet.sweep_seconds: is there twice"),
        ("fleet: &a\n  b: *a", "fleet.b: contains itself"),
        ("1: {}", "the key '1' is not text"),
        ("[fleet]", "holds a list; expected the sections optimization, monitoring, models, fleet"),
    ],
)
def test_wrong_files_are_refused_in_one_line(write, text, expected):
    """Wrong types, impossible values, contradictions and broken YAML each give one line that says what and where."""
    path = write(text)

    (line,) = problems(path)

    assert line.startswith(str(path))
    assert expected in line


def test_a_file_that_is_not_text_is_refused(tmp_path):
    """Bytes that are no UTF-8 are answered like any other broken file."""
    path = tmp_path / "s.yaml"
    path.write_bytes(b"fleet: \x80\x81\n")

    (line,) = problems(path)

    assert line.startswith(f"{path}: not valid YAML")


@pytest.mark.parametrize(
    ("text", "environ"),
    [
        ("fleet: {redis_url: 'http://me:hunter2@host'}", {}),
        ("fleet: {redis_url: 'redis:/me:hunter2@host'}", {}),
        ("fleet: {redis_password: hunter2}", {}),
        ("", {"MUAI_FLEET_REDIS_URL": "http://:hunter2@host"}),
        ("", {"REDIS_URL": "http://host?password=hunter2"}),
        ("", {"MUAI_REDIS_PASSWORD": "hunter2"}),
        ("monitoring: {anomaly: {webhook_url: 'ftp://host/hunter2'}}", {}),
    ],
)
def test_secrets_are_never_shown(write, text, environ):
    """Passwords, tokens and the keys in webhook URLs stay out of the error."""
    assert "hunter2" not in "\n".join(problems(write(text), environ))


# --- the files in the repository ----------------------------------------------------------------------------------


# Requirements: 14.1, 14.4
@pytest.mark.parametrize(
    "path",
    [
        path
        for path in sorted((REPOSITORY / "config").rglob("*.yaml"))
        if path.parent.name in ("config", "scenarios") and "optimization:" in path.read_text(encoding="utf-8")
    ],
    ids=lambda path: path.name,
)
def test_the_files_in_config_load(path, tmp_path, monkeypatch):
    """Every settings file that comes with the repository is valid, wherever it is loaded from."""
    monkeypatch.chdir(tmp_path)

    settings = load_settings(path, {})

    assert all(Path(spec.path).is_absolute() for spec in settings.models.catalog.values())


# Requirements: 14.4
@pytest.mark.parametrize("name", ["high-throughput", "low-latency", "cpu-only", "development"])
def test_every_scenario_has_a_file(name):
    """The scenarios that are documented exist and differ from the defaults."""
    settings = load_settings(REPOSITORY / "config" / "scenarios" / f"{name}.yaml", {})

    assert settings.optimization.batcher != Settings().optimization.batcher


# Requirements: 14.6
def test_the_example_is_the_defaults():
    """The example file shows every option with its default."""
    assert load_settings(REPOSITORY / "config" / "optimization.example.yaml", {}) == Settings()
