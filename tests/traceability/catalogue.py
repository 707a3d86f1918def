"""The properties and requirements of the specification, each in a few words of our own; what is open has a room.

What has no ``room`` is due: the page is not written while no test shows it. Whoever builds a room adds the tests and
takes the room out here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Property:
    """What holds for all inputs. ``validates`` are the requirements that it bears out."""

    number: int
    words: str
    validates: tuple[str, ...]
    room: str = ""


@dataclass(frozen=True, slots=True)
class Requirement:
    """One acceptance criterion. With a ``room`` it is not shown yet, or only a part of it is."""

    number: str
    words: str
    room: str = ""


ROOMS = {
    "metrics": "Prometheus metrics",
    "traces": "OpenTelemetry traces",
    "windows": "performance windows",
    "alerts": "anomalies and alerts",
    "KV": "KV cache and placement",
    "tuning": "automatic tuning",
    "health": "health and readiness endpoints",
    "control": "settings that change at run time",
    "workflows": "workflows",
    "old API": "the classes of the system before",
    "GPUs": "measurements on machines with several GPUs",
}


def _property(number: int, words: str, validates: str, room: str = "") -> Property:
    return Property(number, words, tuple(validates.split()), room)


PROPERTIES: tuple[Property, ...] = (
    _property(1, "the first live engine of the preference serves", "1.1 2.1 3.1"),
    _property(2, "what fails goes on to the next engine of the chain", "1.4 1.6 2.4 2.5 3.4 3.5 15.1 15.2 15.3"),
    _property(3, "an engine is run as it was configured", "1.5 2.2 2.3 3.3"),
    _property(4, "a converted model answers as the original does", "3.2"),
    _property(5, "compatible requests run together", "6.1"),
    _property(6, "a batch runs when it is full or has waited long enough", "6.2 6.3"),
    _property(7, "batches grow and shrink with the load", "6.4"),
    _property(8, "rows of a batch are padded to one length", "6.5"),
    _property(9, "without batching each request runs alone, at once", "6.6"),
    _property(10, "models that can have a KV cache have one", "7.1", "KV"),
    _property(11, "a later turn finds what an earlier one left", "7.2", "KV"),
    _property(12, "what was used longest ago makes room", "7.3", "KV"),
    _property(13, "the end of a conversation frees its memory", "7.4", "KV"),
    _property(14, "hits and misses are counted", "7.5", "KV"),
    _property(15, "every answer counts in latency and throughput", "4.2 4.3", "metrics"),
    _property(16, "loads and unloads are counted", "4.4", "metrics"),
    _property(17, "memory and processor use are measured all the time", "4.5 4.6", "metrics"),
    _property(18, "what is served is valid Prometheus text", "4.7", "metrics"),
    _property(19, "each request has a root span of its own", "5.1", "traces"),
    _property(20, "each step of a workflow has a span below it", "5.2", "traces"),
    _property(21, "a span of inference says model, engine and batch size", "5.3", "traces"),
    _property(22, "a span that ends has a duration and a status", "5.4", "traces"),
    _property(23, "an error is told in its span", "5.5", "traces"),
    _property(24, "one trace goes through every process", "5.6", "traces"),
    _property(25, "a loaded model stays loaded", "8.1"),
    _property(26, "what is accepted waits in its queue", "8.2"),
    _property(27, "a full queue refuses", "8.3"),
    _property(28, "a worker that stops answers what it has begun", "8.5"),
    _property(29, "the latency of each request is kept", "9.1", "windows"),
    _property(30, "the time of each model is kept", "9.2", "windows"),
    _property(31, "throughput is known for any window", "9.3", "windows"),
    _property(32, "the use of resources can be asked", "9.4", "windows"),
    _property(33, "percentiles can be asked", "9.5", "windows"),
    _property(34, "too high a latency is an alert", "10.1", "alerts"),
    _property(35, "too many errors are an alert", "10.2", "alerts"),
    _property(36, "too much memory is an alert", "10.3", "alerts"),
    _property(37, "too little throughput is an alert", "10.4", "alerts"),
    _property(38, "an alert reaches every destination", "10.5", "alerts"),
    _property(39, "alike alerts are not repeated too soon", "10.6", "alerts"),
    _property(40, "layers can be shared by several GPUs", "11.1"),
    _property(41, "stages can lie on several GPUs", "11.2"),
    _property(42, "GPUs are loaded evenly", "11.3"),
    _property(43, "a GPU that fails is noticed", "11.4"),
    _property(44, "each GPU has figures of its own", "11.5", "metrics"),
    _property(45, "the batch size follows the load", "12.1", "tuning"),
    _property(46, "the timeouts follow the arrivals", "12.2", "tuning"),
    _property(47, "the cache size follows its use", "12.3", "tuning"),
    _property(48, "each decision is told with its reason", "12.5", "tuning"),
    _property(49, "switched off, tuning changes nothing", "12.6", "tuning"),
    _property(50, "with everything optional switched off, plain PyTorch serves", "13.1"),
    _property(51, "a library that is not installed is passed over", "13.2"),
    _property(52, "each feature can be switched on and off", "13.3"),
    _property(53, "code for the system before goes on working", "13.4", "old API"),
    _property(54, "what a file says is what is set", "14.1"),
    _property(55, "the environment wins over the file", "14.2"),
    _property(56, "what is wrong is refused by name", "14.3"),
    _property(57, "what is left out has its default", "14.4"),
    _property(58, "settings that are safe to change change at run time", "14.5", "control"),
    _property(59, "monitoring that fails stops no request", "15.4 15.5", "metrics"),
    _property(60, "health says what is degraded", "15.6", "health"),
)

REQUIREMENTS: tuple[Requirement, ...] = (
    Requirement("1.1", "vLLM serves where it is there"),
    Requirement("1.2", "requests join vLLM's running batch"),
    Requirement("1.3", "vLLM keeps its KV cache in pages"),
    Requirement("1.4", "without vLLM another engine serves"),
    Requirement("1.5", "vLLM is given its tensor parallelism"),
    Requirement("1.6", "an error of vLLM's is logged and another engine tried"),
    Requirement("2.1", "DeepSpeed serves where it is there"),
    Requirement("2.2", "DeepSpeed's tensor parallelism"),
    Requirement("2.3", "DeepSpeed's models over several GPUs"),
    Requirement("2.4", "without DeepSpeed another engine serves"),
    Requirement("2.5", "DeepSpeed that cannot start is logged and passed over"),
    Requirement("3.1", "ONNX Runtime serves where it is there"),
    Requirement("3.2", "a conversion is held to the original"),
    Requirement("3.3", "the execution providers that are there are used"),
    Requirement("3.4", "without ONNX Runtime PyTorch serves"),
    Requirement("3.5", "a conversion that fails is logged, the original serves"),
    Requirement("4.1", "a metrics endpoint that can be configured", "metrics"),
    Requirement("4.2", "latency", "metrics"),
    Requirement("4.3", "throughput", "metrics"),
    Requirement("4.4", "loads and unloads of models", "metrics"),
    Requirement("4.5", "GPU memory", "metrics"),
    Requirement("4.6", "processor use", "metrics"),
    Requirement("4.7", "Prometheus' text format", "metrics"),
    Requirement("5.1", "a root span for each request", "traces"),
    Requirement("5.2", "a span for each step of a workflow", "traces"),
    Requirement("5.3", "a span of inference with its model", "traces"),
    Requirement("5.4", "duration and status", "traces"),
    Requirement("5.5", "errors in spans", "traces"),
    Requirement("5.6", "the context goes along", "traces"),
    Requirement("5.7", "export to a collector", "traces"),
    Requirement("6.1", "compatible requests in one batch"),
    Requirement("6.2", "a full batch runs"),
    Requirement("6.3", "a batch that has waited runs as it is"),
    Requirement("6.4", "the batch size follows the load"),
    Requirement("6.5", "padding"),
    Requirement("6.6", "batching switched off"),
    Requirement("7.1", "KV caches", "KV"),
    Requirement("7.2", "reuse between turns", "KV"),
    Requirement("7.3", "the least recently used goes", "KV"),
    Requirement("7.4", "the end of a conversation frees its memory", "KV"),
    Requirement("7.5", "hit rates", "KV"),
    Requirement("8.1", "models stay loaded"),
    Requirement("8.2", "requests wait in a queue"),
    Requirement("8.3", "a full queue refuses with an error of its own"),
    Requirement("8.4", "models are loaded at the start"),
    Requirement("8.5", "a stop finishes what is pending"),
    Requirement("8.6", "health endpoints", "health"),
    Requirement("9.1", "latency of each request", "windows"),
    Requirement("9.2", "time of each model", "windows"),
    Requirement("9.3", "throughput over windows", "windows"),
    Requirement("9.4", "use of resources", "windows"),
    Requirement("9.5", "percentiles", "windows"),
    Requirement("9.6", "the figures can be asked for", "windows"),
    Requirement("10.1", "alerts on latency", "alerts"),
    Requirement("10.2", "alerts on errors", "alerts"),
    Requirement("10.3", "alerts on memory", "alerts"),
    Requirement("10.4", "alerts on throughput", "alerts"),
    Requirement("10.5", "destinations of alerts", "alerts"),
    Requirement("10.6", "alike alerts are held back", "alerts"),
    Requirement("11.1", "tensor parallelism over GPUs"),
    Requirement("11.2", "pipeline parallelism over GPUs"),
    Requirement("11.3", "the load on GPUs is even"),
    Requirement("11.4", "a GPU that fails is noticed and replaced"),
    Requirement("11.5", "figures of each GPU", "metrics"),
    Requirement("12.1", "batch sizes follow the load", "tuning"),
    Requirement("12.2", "timeouts follow the load", "tuning"),
    Requirement("12.3", "cache sizes follow the load", "tuning"),
    Requirement("12.4", "the past is learnt from", "tuning"),
    Requirement("12.5", "decisions are told", "tuning"),
    Requirement("12.6", "switched off, what is configured counts", "tuning"),
    Requirement("13.1", "without optimizations as before"),
    Requirement("13.2", "without their libraries as before"),
    Requirement("13.3", "features are configured"),
    Requirement("13.4", "the API of models and workflows is kept", "old API"),
    Requirement("13.5", "what is off costs nothing", "old API"),
    Requirement("14.1", "YAML files"),
    Requirement("14.2", "environment variables over them"),
    Requirement("14.3", "checked at the start, errors that say what is wrong"),
    Requirement("14.4", "defaults for common deployments"),
    Requirement("14.5", "changes at run time", "control"),
    Requirement("14.6", "every option is documented"),
    Requirement("15.1", "vLLM that does not start leaves PyTorch"),
    Requirement("15.2", "DeepSpeed that does not start leaves one GPU"),
    Requirement("15.3", "a conversion that fails leaves the original"),
    Requirement("15.4", "metrics that fail stop nothing", "metrics"),
    Requirement("15.5", "traces that fail stop nothing", "traces"),
    Requirement("15.6", "health says what is degraded", "health"),
)

PROPERTY_FILES: dict[str, range] = {
    "test_engine_selection_properties.py": range(1, 5),
    "test_batching_properties.py": range(5, 10),
    "test_cache_properties.py": range(10, 15),
    "test_monitoring_properties.py": range(15, 25),
    "test_server_properties.py": range(25, 29),
    "test_performance_properties.py": range(29, 34),
    "test_anomaly_properties.py": range(34, 40),
    "test_multi_gpu_properties.py": range(40, 45),
    "test_tuning_properties.py": range(45, 50),
    "test_compatibility_properties.py": range(50, 54),
    "test_configuration_properties.py": range(54, 59),
    "test_degradation_properties.py": range(59, 61),
}
"""The specification's property tests, and the properties that it puts there."""

OTHER_FILES: dict[str, tuple[str, ...]] = {
    "unit/test_optimization_manager.py": ("unit/shared/test_routing.py", "unit/models/test_breaker.py"),
    "unit/test_vllm_engine.py": ("contract/test_vllm.py",),
    "unit/test_deepspeed_engine.py": ("contract/test_deepspeed.py",),
    "unit/test_onnx_engine.py": ("contract/test_engines.py", "unit/engines/test_onnx_session.py"),
    "unit/test_dynamic_batcher.py": ("property/path/test_batching_properties.py",),
    "unit/test_kv_cache_manager.py": ("KV",),
    "unit/test_prometheus_exporter.py": ("metrics",),
    "unit/test_otel_tracer.py": ("traces",),
    "unit/test_performance_monitor.py": ("windows",),
    "unit/test_anomaly_detector.py": ("alerts",),
    "unit/test_inference_server.py": (
        "integration/path/test_shutdown.py",
        "integration/path/test_overload.py",
        "health",
    ),
    "unit/test_auto_tuner.py": ("tuning",),
    "integration/test_end_to_end_optimization.py": ("integration/engines/test_engines_in_the_fleet.py",),
    "integration/test_monitoring_integration.py": ("metrics", "traces"),
    "integration/test_server_mode_integration.py": ("integration/path/test_shutdown.py", "health"),
    "integration/test_multi_engine_fallback.py": ("integration/routing/test_fallback.py",),
    "fixtures/models.py": ("support/tiny_models.py",),
    "fixtures/monitoring.py": ("metrics", "traces"),
    "fixtures/configs.py": ("unit/shared/test_settings_loader.py",),
    "benchmarks/benchmark_vllm_throughput.py": ("benchmarks/bench_engines.py",),
    "benchmarks/benchmark_batching_latency.py": ("benchmarks/bench_batching.py",),
    "benchmarks/benchmark_cache_effectiveness.py": ("KV",),
    "benchmarks/benchmark_multi_gpu_scaling.py": ("GPUs",),
}
"""The specification's other files in ``tests/``: the files here that do their work, or the room it will come with."""
