"""Settings from environment variables: text in, plain values out. What these may be is checked by the loader."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from shared.masking import masked
from shared.settings_schema import (
    CONFIG_VARIABLE,
    FALLBACK_VARIABLES,
    VARIABLE_PREFIX,
    KeyPath,
    Schema,
    is_optional,
    resolve,
    variables,
    without_null,
)

_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_NULL = frozenset({"", "null", "none"})


@dataclass(slots=True)
class Overrides:
    """What the environment sets: values and their variables by key path, and what is wrong with the rest."""

    values: dict[KeyPath, Any] = field(default_factory=dict)
    sources: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_environment(environ: Mapping[str, str]) -> Overrides:
    """The settings in ``environ``. Of the variables that are not ours only those in the table of fallbacks are read."""
    found = Overrides()
    known = variables()
    for name in sorted(environ):
        if name.startswith(VARIABLE_PREFIX) and name != CONFIG_VARIABLE:
            if name in known:
                _take(name, environ[name], found)
            else:
                found.problems.append(_unknown(name, environ[name]))
    for name, path in FALLBACK_VARIABLES.items():
        if environ.get(name) and path not in found.values:
            _take(name, environ[name], found)
    return found


def _take(name: str, text: str, found: Overrides) -> None:
    option = variables()[name]
    value = coerce(text, option.schema)
    path = option.path
    if path in found.values and found.values[path] != value:
        other, shown = found.sources[path], masked([found.values[path], value], path[-1])
        found.problems.append(
            f"{other} and {name} both set {option.key}, to different values: {shown[0]!r} and {shown[1]!r}; "
            "set one of them"
        )
        return
    found.values.setdefault(path, value)
    found.sources.setdefault(path, name)


def coerce(text: str, schema: Schema) -> Any:
    """The value that ``text`` stands for under ``schema``.

    Text that stands for none comes back unchanged: validation refuses it in the same words as a wrong value in a file.
    """
    schema = resolve(schema)
    stripped = text.strip()
    if is_optional(schema) and stripped.lower() in _NULL:
        return None
    inner = without_null(schema)
    kind = inner.get("type")
    if kind == "boolean":
        return _WORDS.get(stripped.lower(), text)
    if kind == "array":
        items = inner.get("items", {})
        return [coerce(part.strip(), items) for part in text.split(",")] if stripped else []
    if kind == "object":
        return _mapping(text)
    if kind in _NUMBERS:
        try:
            return _NUMBERS[kind](stripped)
        except ValueError:
            return text
    return stripped


_NUMBERS: Mapping[Any, type[int] | type[float]] = {"integer": int, "number": float}


def _mapping(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return {} if value is None else value


def _unknown(name: str, text: str) -> str:
    # Every name begins alike, so a likeness counts for less than it would elsewhere.
    near = difflib.get_close_matches(name, [*variables(), CONFIG_VARIABLE], n=1, cutoff=0.75)
    hint = f"; did you mean {near[0]}?" if near else "; docs/configuration.md lists them all"
    return f"{name}: no such variable (its value: {masked(text, name)!r}){hint}"
