"""Loads the settings: defaults, then a YAML file, then the environment; all problems in one clear error."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from shared.broker import masked
from shared.errors import ConfigurationError
from shared.settings import Settings

DEFAULT_FILE = Path("config/optimization.yaml")
CONFIG_VARIABLE = "MUAI_CONFIG"

_PREFIXES = {"optimization": "MUAI_OPT", "monitoring": "MUAI_MON", "models": "MUAI_MODELS", "fleet": "MUAI_FLEET"}

ALIASES: dict[str, str] = {
    "REDIS_URL": "fleet.redis_url",
    "MUAI_OPT_VLLM_TENSOR_PARALLEL": "optimization.vllm.tensor_parallel_size",
    "MUAI_OPT_VLLM_GPU_MEMORY": "optimization.vllm.gpu_memory_utilization",
    "MUAI_OPT_BATCHER_MAX_SIZE": "optimization.batcher.max_batch_size",
    "MUAI_OPT_BATCHER_TIMEOUT": "optimization.batcher.batch_timeout_ms",
    "MUAI_OPT_CACHE_MAX_MEMORY": "optimization.cache.max_memory_mb",
    "MUAI_MON_ANOMALY_LATENCY_THRESHOLD": "monitoring.anomaly.latency_threshold_ms",
    "MUAI_MON_ANOMALY_ERROR_RATE_THRESHOLD": "monitoring.anomaly.error_rate_threshold",
    "MUAI_MON_ANOMALY_MEMORY_THRESHOLD": "monitoring.anomaly.memory_threshold_percent",
    "MUAI_MON_ANOMALY_THROUGHPUT_THRESHOLD": "monitoring.anomaly.throughput_threshold_rps",
}
"""Names that do not follow from the key. A variable of ours wins over ``REDIS_URL``."""

_SPELLINGS = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


def load_settings(path: Path | str | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """The settings in force.

    The file is ``path``, else what ``MUAI_CONFIG`` names, else ``config/optimization.yaml`` where that exists. Raises
    :class:`ConfigurationError` that lists every problem: where it is, the value, what is allowed, the nearest name.
    """
    environ = os.environ if environ is None else environ
    file = _file(path, environ)
    problems: list[str] = []
    data = _read(file) if file is not None else {}
    if file is not None:
        problems += _unknown_keys(data, Settings, (), file)
        _resolve_paths(data, file)
    origins = _apply_environment(data, environ, problems)
    if not problems:
        try:
            return Settings.model_validate(data)
        except ValidationError as error:
            problems = [_describe(item, file, origins) for item in error.errors(include_url=False)]
    raise ConfigurationError("the configuration is not valid:\n  " + "\n  ".join(problems))


def leaves(model: type[BaseModel] = Settings, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Every key of the settings with its field, depth first."""
    for name, field in model.model_fields.items():
        section = _section(field)
        if section is not None:
            yield from leaves(section, (*path, name))
        else:
            yield (*path, name), field


def variable_of(path: tuple[str, ...]) -> str:
    """The environment variable of a key: ``optimization.vllm.dtype`` is ``MUAI_OPT_VLLM_DTYPE``."""
    return "_".join([_PREFIXES[path[0]], *path[1:]]).upper()


def variables() -> dict[str, tuple[str, ...]]:
    """Every environment variable with the key it sets. Keys that hold a mapping have none."""
    names = {variable_of(path): path for path, field in leaves() if not _is_mapping(field)}
    names.update({alias: tuple(key.split(".")) for alias, key in ALIASES.items()})
    return names


# --- the file -----------------------------------------------------------------------------------------------------------


def _file(path: Path | str | None, environ: Mapping[str, str]) -> Path | None:
    named = path or environ.get(CONFIG_VARIABLE)
    if named:
        file = Path(named)
        if not file.is_file():
            raise ConfigurationError(f"there is no configuration file {file} (named by {'an argument' if path else CONFIG_VARIABLE})")
        return file
    return DEFAULT_FILE if DEFAULT_FILE.is_file() else None


def _read(file: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigurationError(f"{file}{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file}: not valid YAML: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigurationError(f"{file}: the file must hold a mapping, not a {type(data).__name__}")
    return data


def _unknown_keys(data: Mapping[Any, Any], model: type[BaseModel], path: tuple[str, ...], file: Path) -> list[str]:
    problems = []
    for key, value in data.items():
        where = ".".join((*path, str(key)))
        if key not in model.model_fields:
            problems.append(f"{file}: {where}: unknown key{_nearest(str(key), model.model_fields)}")
            continue
        section = _section(model.model_fields[key])
        if section is None:
            continue
        if value is None:
            problems.append(f"{file}: {where}: is empty; leave the key out, or give the section's keys")
        elif isinstance(value, Mapping):
            problems += _unknown_keys(value, section, (*path, str(key)), file)
    return problems


def _resolve_paths(data: dict[str, Any], file: Path) -> None:
    """A model's path that exists relative to the file is meant so; anything else may be a hub id."""
    models = data.get("models")
    catalog = models.get("catalog") if isinstance(models, dict) else None
    for spec in (catalog or {}).values() if isinstance(catalog, dict) else ():
        if isinstance(spec, dict) and isinstance(spec.get("path"), str):
            beside = file.parent / Path(spec["path"]).expanduser()
            if beside.exists():
                spec["path"] = str(beside.resolve())


# --- the environment ------------------------------------------------------------------------------------------------------


def _apply_environment(data: dict[str, Any], environ: Mapping[str, str], problems: list[str]) -> dict[str, str]:
    """Write variables over the file's values; returns which variable set which key."""
    known = variables()
    fields = {path: field for path, field in leaves()}
    origins: dict[str, str] = {}
    for name in sorted(environ, key=lambda name: (name != "REDIS_URL", name)):
        if name == CONFIG_VARIABLE or not (name.startswith("MUAI_") or name == "REDIS_URL"):
            continue
        path = known.get(name)
        if path is None:
            problems.append(f"environment: {name}: unknown variable{_nearest(name, [*known, CONFIG_VARIABLE])}")
            continue
        key = ".".join(path)
        value = _parse(environ[name], fields[path])
        previous = origins.get(key)
        if previous not in (None, "REDIS_URL") and _lookup(data, path) != value:
            problems.append(f"environment: {previous} and {name} both set {key}, to different values")
            continue
        target = data
        for part in path[:-1]:
            nested = target.get(part)
            if not isinstance(nested, dict):
                nested = target[part] = {}
            target = nested
        target[path[-1]] = value
        origins[key] = name
    return origins


def _parse(text: str, field: FieldInfo) -> Any:
    if _is_list(field):
        return [part.strip() for part in text.split(",") if part.strip()]
    if _is_optional(field) and text.strip().lower() in ("", "null", "none"):
        return None
    return text.strip()


def _lookup(data: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = data
    for part in path:
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


# --- saying what is wrong -------------------------------------------------------------------------------------------------


def _describe(item: Any, file: Path | None, origins: Mapping[str, str]) -> str:
    parts = [str(part) for part in item["loc"]]
    key = ".".join(parts)
    owner = next((origins[".".join(parts[:end])] for end in range(len(parts), 0, -1) if ".".join(parts[:end]) in origins), None)
    where = f"environment: {owner} ({key})" if owner else f"{file or 'defaults'}: {key}".rstrip(": ")
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        return f"{where}: unknown key"
    value = item.get("input")
    shown = "" if isinstance(value, Mapping | BaseModel) else f" (it is {_shown(key, value)})"
    return f"{where}: {message}{shown}"


def _shown(key: str, value: Any) -> str:
    if key.endswith("url") and isinstance(value, str):
        return repr(masked(value))
    return "hidden" if any(word in key for word in ("password", "secret", "token")) and isinstance(value, str) else repr(value)


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(sorted(known)[:12])}"


# --- types ----------------------------------------------------------------------------------------------------------------


def _section(field: FieldInfo) -> type[BaseModel] | None:
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _is_mapping(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is dict


def _is_list(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is tuple


def _is_optional(field: FieldInfo) -> bool:
    return type(None) in get_args(field.annotation)


def normal_dtype(dtype: str) -> str:
    """The library's spelling of a number format: ``fp16`` is ``float16``."""
    return _SPELLINGS.get(dtype, dtype)
