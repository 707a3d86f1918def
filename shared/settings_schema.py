"""What can be configured, read off the settings' own schema: keys, what each allows, and its environment variables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from shared import broker_url
from shared.settings import Settings

KeyPath = tuple[str, ...]
Schema = Mapping[str, Any]

CONFIG_VARIABLE: Final = "MUAI_CONFIG"
VARIABLE_PREFIX: Final = "MUAI_"
_PREFIXES: Final = {"optimization": "OPT", "monitoring": "MON", "models": "MODELS", "fleet": "FLEET"}

ALIASES: Final[Mapping[str, KeyPath]] = {
    "MUAI_OPT_VLLM_TENSOR_PARALLEL": ("optimization", "vllm", "tensor_parallel_size"),
    "MUAI_OPT_VLLM_GPU_MEMORY": ("optimization", "vllm", "gpu_memory_utilization"),
    "MUAI_OPT_BATCHER_MAX_SIZE": ("optimization", "batcher", "max_batch_size"),
    "MUAI_OPT_BATCHER_TIMEOUT": ("optimization", "batcher", "batch_timeout_ms"),
    "MUAI_OPT_CACHE_MAX_MEMORY": ("optimization", "cache", "max_memory_mb"),
    "MUAI_MON_ANOMALY_LATENCY_THRESHOLD": ("monitoring", "anomaly", "latency_threshold_ms"),
}
"""Environment variables that are not named after their key."""

FALLBACK_VARIABLES: Final[Mapping[str, KeyPath]] = {"REDIS_URL": ("fleet", "redis_url")}
"""Variables of the surroundings that count where ours is not set."""

_PATTERNS: Final = {
    broker_url.PATTERN: "a URL that begins with redis://, rediss://, unix://, redis+socket:// or sentinel://",
    "^https?://": "a URL that begins with http:// or https://",
    "^/": "a path that begins with /",
    r"^(auto|cpu|cuda(:\d+)?)$": "auto, cpu, cuda or cuda:N",
}


@dataclass(frozen=True, slots=True)
class Option:
    """One setting: where it is, what it does, and the variables that set it (its own name first)."""

    path: KeyPath
    schema: Schema
    description: str
    default: Any
    variables: tuple[str, ...]

    @property
    def key(self) -> str:
        """The path with dots."""
        return ".".join(self.path)


@cache
def root_schema() -> Schema:
    """The JSON schema of the settings."""
    return Settings.model_json_schema()


def resolve(schema: Schema) -> Schema:
    """The schema that a reference stands for."""
    while "$ref" in schema:
        schema = root_schema()["$defs"][schema["$ref"].rpartition("/")[2]]
    return schema


def schema_at(path: Sequence[str | int]) -> Schema | None:
    """The schema of what lies at ``path``, ``None`` where nothing is configured there."""
    schema = resolve(root_schema())
    for part in path:
        inner = _step(without_null(schema), part)
        if inner is None:
            return None
        schema = resolve(inner)
    return schema


def _step(schema: Schema, part: str | int) -> Schema | None:
    if isinstance(part, int):
        items: Schema | None = schema.get("items")
        return items
    properties = schema.get("properties", {})
    if part in properties:
        found: Schema = properties[part]
        return found
    extra = schema.get("additionalProperties")
    return extra if isinstance(extra, Mapping) else None


def without_null(schema: Schema) -> Schema:
    """For an optional value the schema of the value itself."""
    choices = [resolve(choice) for choice in schema.get("anyOf", ())]
    others = [choice for choice in choices if choice.get("type") != "null"]
    return others[0] if len(others) == 1 and len(choices) == 2 else schema


def is_optional(schema: Schema) -> bool:
    """Whether null is allowed."""
    return any(resolve(choice).get("type") == "null" for choice in schema.get("anyOf", ()))


def keys_in(path: Sequence[str | int]) -> list[str]:
    """The keys that a section may have; empty where there is no section or where its keys are the user's."""
    schema = schema_at(path)
    return list(without_null(schema).get("properties", {})) if schema is not None else []


def variable_of(path: KeyPath) -> str:
    """The environment variable named after a key."""
    return "_".join((VARIABLE_PREFIX + _PREFIXES[path[0]], *path[1:])).upper()


@cache
def options() -> tuple[Option, ...]:
    """Every setting, in the order of the model."""
    aliases: dict[KeyPath, list[str]] = {}
    for variable, path in (*ALIASES.items(), *FALLBACK_VARIABLES.items()):
        aliases.setdefault(path, []).append(variable)
    return tuple(_walk((), root_schema(), Settings(), aliases))


def _walk(path: KeyPath, schema: Schema, value: Any, aliases: Mapping[KeyPath, Sequence[str]]) -> Iterator[Option]:
    for name, field in schema["properties"].items():
        inner, here, default = resolve(field), (*path, name), getattr(value, name)
        if "properties" in inner:
            yield from _walk(here, inner, default, aliases)
        else:
            variables = (variable_of(here), *aliases.get(here, ()))
            yield Option(here, inner, field.get("description", ""), default, variables)


@cache
def variables() -> Mapping[str, Option]:
    """Every environment variable, the aliases among them, and what it sets."""
    return {variable: option for option in options() for variable in option.variables}


def allowed(schema: Schema) -> str:
    """What a value may be, in words."""
    schema = resolve(schema)
    if is_optional(schema):
        return f"{allowed(without_null(schema))}, or null"
    if "enum" in schema:
        return "one of " + ", ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    describe = _ALLOWED.get(str(schema.get("type")))
    return describe(schema) if describe is not None else "any value"


def choices(schema: Schema | None) -> list[str]:
    """The words that a value may be, empty where it is not a choice among words."""
    return [str(choice) for choice in without_null(resolve(schema)).get("enum", ())] if schema is not None else []


def _number(noun: str, schema: Schema) -> str:
    bounds = [
        f"{words} {schema[key]:g}"
        for key, words in (
            ("minimum", "at least"),
            ("exclusiveMinimum", "above"),
            ("maximum", "at most"),
            ("exclusiveMaximum", "below"),
        )
        if key in schema
    ]
    return f"{noun}, {' and '.join(bounds)}" if bounds else noun


def _text(schema: Schema) -> str:
    if "pattern" in schema:
        return _PATTERNS.get(schema["pattern"], f"text that matches {schema['pattern']}")
    return "text that is not empty" if schema.get("minLength") else "text"


def _list(schema: Schema) -> str:
    start = "a list that is not empty" if schema.get("minItems") else "a list"
    return f"{start}, each {allowed(schema.get('items', {}))}"


def _mapping(schema: Schema) -> str:
    if "properties" in schema:
        return "a section with the keys " + ", ".join(schema["properties"])
    return "a mapping"


_ALLOWED: Final = {
    "boolean": lambda _: "true or false",
    "integer": lambda schema: _number("a whole number", schema),
    "number": lambda schema: _number("a number", schema),
    "string": _text,
    "array": _list,
    "object": _mapping,
}
