"""Environment variables: their names, their aliases, and how their text is read."""

import pytest

from shared.contract import EngineName
from shared.errors import ConfigurationError
from shared.settings import Settings
from shared.settings_loader import load_settings
from shared.settings_schema import ALIASES, options, schema_at, variables

GUIDE = {
    "MUAI_OPT_ENABLED": ("true", "optimization.enabled", True),
    "MUAI_OPT_VLLM_ENABLED": ("true", "optimization.vllm.enabled", True),
    "MUAI_OPT_VLLM_TENSOR_PARALLEL": ("2", "optimization.vllm.tensor_parallel_size", 2),
    "MUAI_OPT_VLLM_DTYPE": ("fp16", "optimization.vllm.dtype", "fp16"),
    "MUAI_OPT_VLLM_GPU_MEMORY": ("0.8", "optimization.vllm.gpu_memory_utilization", 0.8),
    "MUAI_OPT_DEEPSPEED_ENABLED": ("false", "optimization.deepspeed.enabled", False),
    "MUAI_OPT_DEEPSPEED_TENSOR_PARALLEL": ("2", "optimization.deepspeed.tensor_parallel", 2),
    "MUAI_OPT_ONNX_ENABLED": ("true", "optimization.onnx.enabled", True),
    "MUAI_OPT_BATCHER_ENABLED": ("false", "optimization.batcher.enabled", False),
    "MUAI_OPT_BATCHER_MAX_SIZE": ("16", "optimization.batcher.max_batch_size", 16),
    "MUAI_OPT_BATCHER_TIMEOUT": ("25", "optimization.batcher.batch_timeout_ms", 25),
    "MUAI_OPT_CACHE_ENABLED": ("true", "optimization.cache.enabled", True),
    "MUAI_OPT_CACHE_MAX_MEMORY": ("2048", "optimization.cache.max_memory_mb", 2048),
    "MUAI_OPT_TUNER_ENABLED": ("true", "optimization.tuner.enabled", True),
    "MUAI_MON_ENABLED": ("false", "monitoring.enabled", False),
    "MUAI_MON_PROMETHEUS_ENABLED": ("true", "monitoring.prometheus.enabled", True),
    "MUAI_MON_PROMETHEUS_PORT": ("9191", "monitoring.prometheus.port", 9191),
    "MUAI_MON_TRACING_ENABLED": ("true", "monitoring.tracing.enabled", True),
    "MUAI_MON_TRACING_ENDPOINT": ("http://otel:4317", "monitoring.tracing.endpoint", "http://otel:4317"),
    "MUAI_MON_TRACING_SAMPLE_RATE": ("0.5", "monitoring.tracing.sample_rate", 0.5),
    "MUAI_MON_ANOMALY_ENABLED": ("true", "monitoring.anomaly.enabled", True),
    "MUAI_MON_ANOMALY_LATENCY_THRESHOLD": ("500.0", "monitoring.anomaly.latency_threshold_ms", 500.0),
    "MUAI_MON_SERVER_ENABLED": ("true", "monitoring.server.enabled", True),
    "MUAI_MON_SERVER_PORT": ("8001", "monitoring.server.port", 8001),
    "MUAI_MON_SERVER_QUEUE_CAPACITY": ("50", "monitoring.server.queue_capacity", 50),
}
"""The variables of the original configuration guide (its list of models to preload has a test of its own)."""


@pytest.fixture(autouse=True)
def _nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def value_at(settings: Settings, key: str) -> object:
    """What the settings hold at ``key``."""
    value: object = settings
    for part in key.split("."):
        value = getattr(value, part)
    return value


# Requirements: 14.2
@pytest.mark.parametrize("variable", GUIDE)
def test_the_guides_variables_work(variable):
    """Each variable of the original guide sets the option it is documented for."""
    text, key, expected = GUIDE[variable]

    assert value_at(load_settings(None, {variable: text}), key) == expected


def test_the_guides_preloaded_models_work():
    """``MUAI_MON_SERVER_PRELOAD_MODELS`` is a comma-separated list of declared models."""
    environ = {
        "MUAI_MON_SERVER_PRELOAD_MODELS": "qwen_chat,t5_summarizer",
        "MUAI_MODELS_CATALOG": '{"qwen_chat": {"path": "a"}, "t5_summarizer": {"path": "b", "kinds": ["summarize"]}}',
    }

    assert load_settings(None, environ).monitoring.server.preload_models == ("qwen_chat", "t5_summarizer")


def test_every_option_has_variables_of_its_own():
    """No two options share a variable, and no alias hides another option's own name."""
    names = [name for option in options() for name in option.variables]

    assert len(names) == len(set(names))
    assert set(ALIASES) < set(variables())
    assert all(schema_at(path) is not None for path in ALIASES.values())


@pytest.mark.parametrize(
    ("environ", "key", "expected"),
    [
        (
            {"MUAI_OPT_ENGINE_PREFERENCE": " onnx , pytorch"},
            "optimization.engine_preference",
            (EngineName.ONNX, EngineName.PYTORCH),
        ),
        ({"MUAI_OPT_BATCHER_LENGTH_BUCKETS": "64,128"}, "optimization.batcher.length_buckets", (64, 128)),
        ({"MUAI_OPT_BATCHER_LENGTH_BUCKETS": ""}, "optimization.batcher.length_buckets", ()),
        ({"MUAI_OPT_VLLM_MAX_MODEL_LEN": ""}, "optimization.vllm.max_model_len", None),
        ({"MUAI_OPT_VLLM_MAX_MODEL_LEN": "null"}, "optimization.vllm.max_model_len", None),
        ({"MUAI_OPT_VLLM_MAX_MODEL_LEN": "4096"}, "optimization.vllm.max_model_len", 4096),
        ({"MUAI_OPT_ENABLED": "OFF"}, "optimization.enabled", False),
        ({"MUAI_OPT_ONNX_VALIDATION_TOLERANCE": "1e-4"}, "optimization.onnx.validation_tolerance", 1e-4),
        ({"REDIS_URL": "redis://a/1"}, "fleet.redis_url", "redis://a/1"),
        ({"REDIS_URL": ""}, "fleet.redis_url", "redis://127.0.0.1:6379/0"),
        ({"REDIS_URL": "redis://a/1", "MUAI_FLEET_REDIS_URL": "redis://b/2"}, "fleet.redis_url", "redis://b/2"),
        (
            {"MUAI_OPT_BATCHER_MAX_SIZE": "8", "MUAI_OPT_BATCHER_MAX_BATCH_SIZE": "08"},
            "optimization.batcher.max_batch_size",
            8,
        ),
    ],
)
def test_text_becomes_values(environ, key, expected):
    """Lists are comma separated, empty or null unsets what is optional, and two names may agree."""
    assert value_at(load_settings(None, environ), key) == expected


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (
            {"MUAI_OPT_VLM_DTYPE": "fp16"},
            ("MUAI_OPT_VLM_DTYPE: no such variable (its value: 'fp16'); did you mean MUAI_OPT_VLLM_DTYPE?"),
        ),
        (
            {"MUAI_REDIS_URL": "redis://:pw@h"},
            ("MUAI_REDIS_URL: no such variable (its value: 'redis://:***@h'); did you mean MUAI_FLEET_REDIS_URL?"),
        ),
        (
            {"MUAI_OPT_ENABLED": "maybe"},
            ("MUAI_OPT_ENABLED: optimization.enabled: 'maybe' is not allowed; allowed: true or false"),
        ),
        ({"MUAI_OPT_ENABLED": ""}, "MUAI_OPT_ENABLED: optimization.enabled: '' is not allowed; allowed: true or false"),
        (
            {"MUAI_MON_PROMETHEUS_PORT": "9090.5"},
            (
                "MUAI_MON_PROMETHEUS_PORT: monitoring.prometheus.port: '9090.5' is not "
                "allowed; allowed: a whole number, at least 0 and at most 65535"
            ),
        ),
        (
            {"MUAI_OPT_BATCHER_MAX_SIZE": "8", "MUAI_OPT_BATCHER_MAX_BATCH_SIZE": "9"},
            (
                "MUAI_OPT_BATCHER_MAX_BATCH_SIZE and MUAI_OPT_BATCHER_MAX_SIZE both set "
                "optimization.batcher.max_batch_size, to different values: 9 and 8; set one of them"
            ),
        ),
        (
            {"MUAI_OPT_BATCHER_MIN_BATCH_SIZE": "64"},
            (
                "optimization.batcher: min_batch_size (64) is above "
                "max_batch_size (32) (set by MUAI_OPT_BATCHER_MIN_BATCH_SIZE)"
            ),
        ),
        ({"MUAI_MODELS_CATALOG": "[1"}, "MUAI_MODELS_CATALOG: models.catalog: '[1' is not allowed; allowed: a mapping"),
        (
            {"MUAI_MODELS_CATALOG": "{a: {path: 1}}"},
            ("MUAI_MODELS_CATALOG: models.catalog.a.path: 1 is not allowed; allowed: text that is not empty"),
        ),
        (
            {"MUAI_MON_SERVER_PRELOAD_MODELS": "x"},
            (
                "MUAI_MON_SERVER_PRELOAD_MODELS: monitoring.server.preload_models "
                "names 'x', which models.catalog does not declare"
            ),
        ),
    ],
)
def test_wrong_variables_are_named(environ, expected):
    """The error names the variable, the value, what is allowed, and the nearest right name."""
    with pytest.raises(ConfigurationError) as caught:
        load_settings(None, environ)

    assert caught.value.message == expected
