"""The configuration: its shape, its defaults and its bounds. No other module reads files or the environment for it.

The sections, names and defaults are those of ``docs/configuration.md``. Loading is in :mod:`shared.settings_loader`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from shared import broker_url
from shared.contract import EngineName, Kind

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Percent = Annotated[float, Field(ge=0.0, le=100.0)]
Port = Annotated[int, Field(ge=0, le=65535)]
Positive = Annotated[int, Field(ge=1)]
PositiveNumber = Annotated[float, Field(gt=0.0)]
PositiveSeconds = PositiveNumber
SHORTEST_KEY = 16
OnOutage = Literal["raise", "wait", "spool"]
Dtype = Literal["auto", "float16", "bfloat16", "float32", "fp16", "bf16", "fp32"]


class Section(BaseModel):
    """Base of every section: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


# --- optimization -------------------------------------------------------------------------------------------------


class VLLMSettings(Section):
    """The vLLM engine."""

    enabled: bool = Field(True, description="Whether workers may serve the vllm queue.")
    tensor_parallel_size: Positive = Field(1, description="GPUs that share one model's layers.")
    pipeline_parallel_size: Positive = Field(1, description="GPUs that hold one model's stages.")
    dtype: Dtype = Field("auto", description="Number format of the weights; auto is float32 on a CPU.")
    max_model_len: Positive | None = Field(None, description="Longest sequence in tokens; null is the model's own.")
    gpu_memory_utilization: Fraction = Field(0.9, description="Share of the GPU's memory vLLM may take.")
    swap_space: Annotated[int, Field(ge=0)] = Field(
        4, description="CPU memory in GB for KV blocks that leave the GPU; in effect where it is set."
    )
    max_num_seqs: Positive = Field(128, description="Most requests that run side by side.")
    kv_cache_gb: Positive = Field(1, description="Memory for the KV cache in GB where vLLM runs on a CPU.")
    enable_prefix_caching: bool = Field(True, description="Share the KV blocks of equal beginnings.")
    kv_events: bool = Field(True, description="Publish which KV blocks are held (ZeroMQ, on this machine).")
    engine_args: dict[str, Any] = Field({}, description="Further arguments of vLLM's AsyncEngineArgs.")


class DeepSpeedSettings(Section):
    """The DeepSpeed engine."""

    enabled: bool = Field(True, description="Whether workers may serve the deepspeed queue.")
    tensor_parallel: Positive = Field(1, description="GPUs that share one model's layers.")
    pipeline_parallel: Positive = Field(1, description="GPUs that hold one model's stages.")
    dtype: Dtype = Field("fp16", description="Number format of the weights.")
    replace_with_kernel_inject: bool = Field(True, description="Use DeepSpeed's own kernels where it has them.")
    zero_offload: Literal["none", "cpu", "nvme"] = Field(
        "none", description="ZeRO-Inference: keep the weights in CPU memory or on a disk and stream them to the GPU."
    )
    nvme_path: str | None = Field(None, description="Folder for the weights; needed where zero_offload is nvme.")
    rank_timeout_seconds: PositiveSeconds = Field(
        300.0, description="How long the model's processes may show no progress before they are restarted."
    )

    @model_validator(mode="after")
    def _offload_has_a_place(self) -> Self:
        if self.zero_offload == "nvme" and not self.nvme_path:
            raise ValueError("zero_offload is nvme, but nvme_path is not set")
        return self


class OnnxSettings(Section):
    """The ONNX Runtime engine."""

    enabled: bool = Field(True, description="Whether workers may serve the onnx queue.")
    execution_providers: tuple[
        Literal[
            "CUDAExecutionProvider",
            "TensorrtExecutionProvider",
            "CPUExecutionProvider",
            "OpenVINOExecutionProvider",
        ],
        ...,
    ] = Field(
        ("CUDAExecutionProvider", "CPUExecutionProvider"),
        min_length=1,
        description="Execution providers in the order they are tried; those that are not installed are passed over.",
    )
    optimization_level: Literal["none", "basic", "extended", "all"] = Field(
        "all", description="How far ONNX Runtime may rewrite the graph."
    )
    enable_quantization: bool = Field(False, description="Quantise the weights to 8 bits when converting.")
    validation_tolerance: Annotated[float, Field(gt=0.0)] = Field(
        1e-3, description="Largest difference between converted and original outputs at which a conversion may serve."
    )


class PyTorchSettings(Section):
    """The PyTorch engine."""

    enabled: bool = Field(True, description="Whether workers may serve the pytorch queue.")
    dtype: Dtype = Field("auto", description="Number format of the weights; auto is float32 on a CPU.")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N.")
    compile: bool = Field(False, description="Compile the forward pass with torch.compile; where it fails, run as is.")
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = Field(
        "default", description="How much torch.compile tries, between the two loads below."
    )
    compile_dynamic: bool | None = Field(
        True, description="One compilation for all shapes; null compiles anew where a shape turns out to change."
    )
    compile_load_high: Fraction = Field(0.8, description="Share of busy time above which max-autotune is chosen.")
    compile_load_low: Fraction = Field(0.3, description="Share of busy time below which default is chosen.")

    @model_validator(mode="after")
    def _loads_rise(self) -> Self:
        if self.compile_load_low > self.compile_load_high:
            raise ValueError(
                f"compile_load_low ({self.compile_load_low}) is above compile_load_high ({self.compile_load_high})"
            )
        return self


class FakeSettings(Section):
    """The fake engine: deterministic answers without a model, for tests and benchmarks of the queue path."""

    enabled: bool = Field(True, description="Whether workers may serve the fake queue.")
    latency_ms: Annotated[float, Field(ge=0.0)] = Field(0.0, description="How long a batch takes.")
    per_item_ms: Annotated[float, Field(ge=0.0)] = Field(0.0, description="How much longer for each row of it.")
    load_ms: Annotated[float, Field(ge=0.0)] = Field(0.0, description="How long loading a model takes.")


class BreakerSettings(Section):
    """When an engine that keeps failing is rested."""

    failures: Positive = Field(5, description="Failures of a model in a row, after which requests go elsewhere.")
    rest_seconds: PositiveSeconds = Field(10.0, description="First rest before it is tried again; doubled each time.")
    longest_rest_seconds: PositiveSeconds = Field(300.0, description="Longest rest.")


class WatchdogSettings(Section):
    """When an engine is taken to hang: its worker gives its requests back, and ends for its supervisor."""

    enabled: bool = Field(True, description="Whether engines are watched.")
    idle_seconds: PositiveSeconds = Field(
        300.0, description="How long a call or a load may make no progress while the worker's processes do nothing."
    )
    busy_seconds: PositiveSeconds = Field(
        3600.0, description="How long a call may make no token and finish no request though something computes."
    )


class RetrySettings(Section):
    """Errors that pass by themselves are tried again on the same engine before the request hops."""

    attempts: Annotated[int, Field(ge=0)] = Field(2, description="How often.")
    backoff_ms: Annotated[float, Field(ge=0.0)] = Field(50.0, description="First pause; doubled each time.")


class ParitySettings(Section):
    """Before an engine joins a model's chain, its answers are held to those of PyTorch in float32."""

    enabled: bool = Field(True, description="Whether engines are checked.")
    required: bool = Field(False, description="Whether a model that cannot be checked is refused.")
    prompts: Annotated[int, Field(ge=1, le=32)] = Field(8, description="Fixed prompts that are asked.")
    max_tokens: Annotated[int, Field(ge=1, le=256)] = Field(16, description="Greedy tokens for each prompt.")
    min_token_agreement: Fraction = Field(1.0, description="Share of equal tokens, for engines in float32.")
    min_token_agreement_reduced: Fraction = Field(0.5, description="The same for fewer bits and quantised weights.")
    max_distance: Annotated[float, Field(ge=0.0)] = Field(
        1e-3, description="Largest cosine distance of embeddings, or difference of scores, in float32."
    )
    max_distance_reduced: Annotated[float, Field(ge=0.0)] = Field(
        0.05, description="The same for fewer bits and quantised weights."
    )
    max_reference_mb: Positive = Field(
        8192, description="Largest weights for which a worker without the PyTorch engine computes the reference itself."
    )
    timeout_seconds: PositiveSeconds = Field(600.0, description="Longest wait for the reference.")


class DevicesSettings(Section):
    """GPUs: which worker of a machine has which."""

    enabled: bool = Field(True, description="Lease GPUs, so that the workers of a machine take different ones.")
    lease_seconds: PositiveSeconds = Field(30.0, description="How long a GPU stays with a silent worker.")
    wait_seconds: Annotated[float, Field(ge=0.0)] = Field(
        60.0, description="How long a starting worker waits for free GPUs."
    )
    check_seconds: PositiveSeconds = Field(5.0, description="How often the health of held GPUs is checked.")
    max_cuda_errors: Positive = Field(3, description="CUDA errors within 60 s at which a GPU counts as failed.")


class BatcherSettings(Section):
    """Micro-batching."""

    enabled: bool = Field(
        True, description="Off: every request runs by itself, in parts where it has more rows than a batch holds."
    )
    max_batch_size: Positive = Field(
        32, description="Most rows in a batch: a request has one, or one for each of its texts."
    )
    batch_timeout_ms: Annotated[float, Field(ge=0.0)] = Field(50, description="Longest wait for a batch to fill.")
    adaptive_batching: bool = Field(True, description="Run a partial batch at once when waiting cannot pay.")
    min_batch_size: Positive = Field(1, description="A batch smaller than this waits for its timeout.")
    max_batch_tokens: Positive = Field(65536, description="Most tokens in a batch, prompts and completions together.")
    length_buckets: tuple[Positive, ...] = Field(
        (256, 1024, 4096), description="Prompt lengths in tokens at which requests go into separate batches."
    )

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.min_batch_size > self.max_batch_size:
            raise ValueError(f"min_batch_size ({self.min_batch_size}) is above max_batch_size ({self.max_batch_size})")
        if list(self.length_buckets) != sorted(set(self.length_buckets)):
            raise ValueError("length_buckets must rise")
        return self


class CacheSettings(Section):
    """The KV cache."""

    enabled: bool = Field(True, description="Reuse key-value pairs between the turns of a conversation.")
    max_memory_mb: Positive = Field(4096, description="Most memory it may take, in MB.")
    eviction_policy: Literal["lru", "fifo"] = Field("lru", description="Which entry goes first.")
    shared_between_tenants: bool = Field(
        False, description="Let a tenant's prompts find what another's left: faster, but times tell what was asked."
    )


class TunerSettings(Section):
    """Automatic tuning."""

    enabled: bool = Field(False, description="Let the fleet change its own parameters.")
    observation_window_seconds: Positive = Field(300, description="How far back it looks.")
    tuning_interval_seconds: Positive = Field(60, description="How often it decides.")
    enable_batch_size_tuning: bool = Field(True, description="May change the batch size.")
    enable_timeout_tuning: bool = Field(True, description="May change the batch timeout.")
    enable_cache_size_tuning: bool = Field(True, description="May change the cache size.")


class OptimizationSettings(Section):
    """Engines, batching, cache and tuning."""

    enabled: bool = Field(True, description="Off: only the PyTorch engine serves.")
    engine_preference: tuple[EngineName, ...] = Field(
        (EngineName.VLLM, EngineName.DEEPSPEED, EngineName.ONNX, EngineName.PYTORCH),
        min_length=1,
        description="Order in which engines are tried.",
    )
    fallback_on_error: bool = Field(True, description="Off: an engine's error goes to the caller.")
    vllm: VLLMSettings = VLLMSettings()
    deepspeed: DeepSpeedSettings = DeepSpeedSettings()
    onnx: OnnxSettings = OnnxSettings()
    pytorch: PyTorchSettings = PyTorchSettings()
    fake: FakeSettings = FakeSettings()
    retry: RetrySettings = RetrySettings()
    breaker: BreakerSettings = BreakerSettings()
    watchdog: WatchdogSettings = WatchdogSettings()
    parity: ParitySettings = ParitySettings()
    devices: DevicesSettings = DevicesSettings()
    batcher: BatcherSettings = BatcherSettings()
    cache: CacheSettings = CacheSettings()
    tuner: TunerSettings = TunerSettings()

    @model_validator(mode="after")
    def _no_engine_twice(self) -> Self:
        if len(set(self.engine_preference)) != len(self.engine_preference):
            raise ValueError("engine_preference names an engine twice")
        return self

    def engine_enabled(self, engine: EngineName) -> bool:
        """Whether the configuration lets ``engine`` serve."""
        if not self.enabled and engine not in (EngineName.PYTORCH, EngineName.FAKE):
            return False
        return bool(getattr(self, engine).enabled)


# --- monitoring ---------------------------------------------------------------------------------------------------


class PrometheusSettings(Section):
    """The metrics endpoint."""

    enabled: bool = Field(True, description="Serve metrics.")
    port: Port = Field(9090, description="Port; the next free one where it is taken.")
    host: str = Field("127.0.0.1", description="Address to bind to.")
    path: str = Field("/metrics", pattern="^/", description="Path of the endpoint.")


class TracingSettings(Section):
    """OpenTelemetry traces."""

    enabled: bool = Field(True, description="Record traces.")
    endpoint: str = Field("http://localhost:4317", pattern="^https?://", description="OTLP collector.")
    sample_rate: Fraction = Field(1.0, description="Share of the requests traced.")
    service_name: str = Field("muai-orchestration", description="Name of the service in traces.")
    export_timeout_ms: Positive = Field(30000, description="Longest wait for the collector.")


class AnomalySettings(Section):
    """Anomaly detection and alerts."""

    enabled: bool = Field(True, description="Look for anomalies.")
    latency_threshold_ms: Annotated[float, Field(gt=0.0)] = Field(1000.0, description="Latency that raises an alert.")
    error_rate_threshold: Fraction = Field(0.05, description="Error rate that raises an alert.")
    memory_threshold_percent: Percent = Field(90.0, description="Memory use that raises an alert.")
    throughput_threshold_rps: Annotated[float, Field(ge=0.0)] = Field(
        1.0, description="Requests/s under which an alert is raised."
    )
    alert_rate_limit_seconds: Annotated[int, Field(ge=0)] = Field(300, description="Least time between alike alerts.")
    alert_destinations: tuple[Literal["log", "webhook", "alertmanager"], ...] = Field(
        ("log",), description="Where alerts go."
    )
    webhook_url: Annotated[str, Field(pattern="^https?://")] | None = Field(
        None, description="Needed when webhook is a destination."
    )

    @model_validator(mode="after")
    def _webhook_has_url(self) -> Self:
        if "webhook" in self.alert_destinations and not self.webhook_url:
            raise ValueError("alert_destinations names webhook, but webhook_url is not set")
        return self


class ServerSettings(Section):
    """The long-running server: gateway address, preloading, shutdown."""

    enabled: bool = Field(False, description="Run the HTTP gateway.")
    host: str = Field("127.0.0.1", description="Address to bind to.")
    port: Port = Field(8000, description="Port.")
    queue_capacity: Positive = Field(
        100, description="Most requests that may wait on an engine's queue; in effect where it is set."
    )
    preload_models: tuple[str, ...] = Field((), description="Models that workers load before they take requests.")
    graceful_shutdown_timeout: Annotated[float, Field(ge=0.0)] = Field(
        30, description="Seconds a stopping worker may take to finish what runs."
    )
    health_check_path: str = Field("/health", pattern="^/", description="Health endpoint.")
    readiness_check_path: str = Field("/ready", pattern="^/", description="Readiness endpoint.")


class MonitoringSettings(Section):
    """Metrics, traces, alerts and the server."""

    enabled: bool = Field(True, description="Off: none of these run.")
    prometheus: PrometheusSettings = PrometheusSettings()
    tracing: TracingSettings = TracingSettings()
    anomaly: AnomalySettings = AnomalySettings()
    server: ServerSettings = ServerSettings()


# --- models -------------------------------------------------------------------------------------------------------


class ModelSpec(Section):
    """One model that the fleet serves."""

    name: str = Field("", description="Filled in from the catalogue's key.")
    path: str = Field(min_length=1, description="Folder with the weights (relative to the file), or a hub id.")
    kinds: tuple[Kind, ...] = Field((Kind.GENERATE, Kind.CHAT), min_length=1, description="What it can be asked.")
    engines: tuple[EngineName, ...] | None = Field(None, description="Engines that may serve it; null is all.")
    engine_preference: tuple[EngineName, ...] | None = Field(
        None, min_length=1, description="Order in which its engines are tried; null is the fleet's."
    )
    pooling: Literal["mean", "cls", "last"] = Field("mean", description="How token vectors become one embedding.")
    normalize: bool = Field(True, description="Scale embeddings to length one.")
    prefix: str | None = Field(
        None, description="Put in front of every input text; null is what the model's own configuration says."
    )
    max_length: Positive | None = Field(None, description="Longest sequence in tokens; null is the model's own.")
    trust_remote_code: bool = Field(False, description="Run code that comes with the model.")
    options: dict[EngineName, dict[str, Any]] = Field({}, description="Further options, an entry per engine.")

    def served_by(self, engine: EngineName) -> bool:
        """Whether this model may be served by ``engine``."""
        return self.engines is None or engine in self.engines


class ModelsSettings(Section):
    """The models and how many stay in memory."""

    cache_dir: str = Field("./models", description="Where converted models are kept.")
    max_cached: Positive = Field(3, description="Most models a worker keeps in memory; the least recently used goes.")
    newest_only: bool = Field(
        False, description="Where workers have different weights under one name, only those with the newest serve."
    )
    catalog: dict[str, ModelSpec] = Field({}, description="The models by name.")

    @model_validator(mode="after")
    def _names_from_keys(self) -> Self:
        for name, spec in self.catalog.items():
            if spec.name not in ("", name):
                raise ValueError(f"catalog.{name} says its name is {spec.name!r}; a model's name is its key")
        named = {name: spec.model_copy(update={"name": name}) for name, spec in self.catalog.items()}
        object.__setattr__(self, "catalog", named)
        return self


# --- fleet --------------------------------------------------------------------------------------------------------


class TenantSettings(Section):
    """What one tenant may take of the fleet."""

    weight: PositiveNumber = Field(1.0, description="Its share of the turns beside other tenants that wait.")
    requests_per_second: PositiveNumber | None = Field(None, description="Most it may submit; null is any number.")
    burst: Positive | None = Field(None, description="Most it may submit at once; null is one second's worth.")
    in_flight_share: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        None, description="Share of the fleet's places its requests may hold at once; null is all. Not for `default`."
    )


class FleetSettings(Section):
    """The broker and the delivery rules."""

    redis_url: str = Field(
        "redis://127.0.0.1:6379/0", pattern=broker_url.PATTERN, description="The broker. REDIS_URL is read too."
    )
    tls_ca_file: str | None = Field(
        None, description="Authorities that may have signed a rediss:// broker's certificate; null is the system's."
    )
    tls_cert_file: str | None = Field(None, description="Our own certificate, where the broker asks for one.")
    tls_key_file: str | None = Field(None, description="Its key, where that is in a file of its own.")
    tls_verify: bool = Field(
        True, description="Check the broker's certificate and name; off, whoever answers is believed."
    )
    lease_seconds: PositiveSeconds = Field(30.0, description="How long a request stays with a silent worker.")
    stall_seconds: PositiveSeconds = Field(
        300.0, description="How long a worker whose loop stands still keeps its requests."
    )
    sweep_seconds: PositiveSeconds = Field(1.0, description="How often each worker looks for expired leases.")
    max_deliveries: Positive = Field(3, description="Deliveries after which a request is dead-lettered.")
    queue_capacity: Positive = Field(
        100_000, description="The same where `monitoring.server.queue_capacity` is not set; more are refused."
    )
    queue_capacity_bytes: Positive = Field(1024**3, description="Most bytes that may wait on an engine's queue.")
    starvation_limit: Positive = Field(10, description="Most more urgent requests that pass a waiting one.")
    tenants: dict[str, TenantSettings] = Field({}, description="Quotas by tenant; `*` is everybody not named.")
    rescue_after_seconds: PositiveSeconds = Field(
        30.0, description="How long a queue may hold messages and have no live worker before they move on."
    )
    heartbeat_seconds: PositiveSeconds = Field(2.0, description="How often a worker announces itself.")
    result_expires_seconds: Positive = Field(3600, description="How long a result can be read.")
    max_payload_bytes: Positive = Field(4 * 1024 * 1024, description="Largest request accepted.")
    max_result_bytes: Positive = Field(16 * 1024 * 1024, description="Largest answer kept; a larger one is an error.")
    signing_key: SecretStr | None = Field(
        None, description="Sign messages and run signed ones only: keys, separated by commas; the first one signs."
    )
    dead_letter_capacity: Positive = Field(10_000, description="Most dead letters kept; the oldest go.")
    dead_letter_capacity_bytes: Positive = Field(
        256 * 2**20, description="Most memory that dead letters take in the broker; the oldest go, but not the last."
    )
    connect_timeout_seconds: PositiveSeconds = Field(1.0, description="Longest wait for a connection to the broker.")
    socket_timeout_seconds: PositiveSeconds = Field(5.0, description="Longest wait for the broker's answer.")
    remote_control: bool = Field(
        True, description="Obey Celery's remote control (inspect, revoke, shutdown) and whoever may publish to it."
    )
    on_outage: OnOutage = Field(
        "raise",
        description="What submitting does while the broker is away: raise an error, wait for it, or spool to a file.",
    )
    spool_path: str = Field(".muai/spool.db", description="The spool: requests that wait for the broker's return.")
    spool_max_bytes: Positive = Field(256 * 1024 * 1024, description="Most bytes of requests in the spool.")
    send_events: bool = Field(True, description="Publish Celery's task events (Flower, celery-exporter).")

    @field_validator("signing_key")
    @classmethod
    def _keys_are_long(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and any(len(key.strip()) < SHORTEST_KEY for key in value.get_secret_value().split(",")):
            raise ValueError(f"each signing key needs {SHORTEST_KEY} characters or more: openssl rand -hex 32")
        return value

    @property
    def silent_after_seconds(self) -> float:
        """A worker that has not announced itself for this long is taken to be gone."""
        return min(8.0, 4 * self.heartbeat_seconds) if self.heartbeat_seconds <= 2 else 4 * self.heartbeat_seconds


class Settings(Section):
    """Everything that can be configured."""

    optimization: OptimizationSettings = OptimizationSettings()
    monitoring: MonitoringSettings = MonitoringSettings()
    models: ModelsSettings = ModelsSettings()
    fleet: FleetSettings = FleetSettings()

    @property
    def queue_capacity(self) -> int:
        """Most requests that may wait on an engine's queue."""
        server = self.monitoring.server
        return server.queue_capacity if "queue_capacity" in server.model_fields_set else self.fleet.queue_capacity

    @model_validator(mode="after")
    def _preloaded_models_are_declared(self) -> Self:
        for name in self.monitoring.server.preload_models:
            if name not in self.models.catalog:
                raise ValueError(
                    f"monitoring.server.preload_models names {name!r}, which models.catalog does not declare"
                )
        return self
