"""Loading the settings: defaults, then a YAML file, then the environment; the later one wins.

Everything that is wrong is collected and raised as one :class:`~shared.errors.ConfigurationError`, a line for each:
where it is, what is there, what is allowed, and the nearest right name.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from shared.errors import ConfigurationError
from shared.masking import masked
from shared.settings import Settings
from shared.settings_env import Overrides, read_environment
from shared.settings_file import FileContent, read_file, resolve_model_paths
from shared.settings_schema import CONFIG_VARIABLE, allowed, choices, keys_in, options, schema_at

DEFAULT_FILE = Path("config/optimization.yaml")
SHOWN_CHARACTERS = 80

Location = tuple[str | int, ...]


def load_settings(path: Path | str | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """The settings of this process.

    The file is ``path``, else what ``MUAI_CONFIG`` names, else ``config/optimization.yaml`` in the current directory
    where that exists, else none. ``environ`` is by default the process's environment. Raises
    :class:`~shared.errors.ConfigurationError`; a file that was named and is not there is one too.
    """
    environ = os.environ if environ is None else environ
    file = configuration_file(path, environ)
    content = read_file(file) if file is not None else FileContent()
    overrides = read_environment(environ)
    tree = _merged(content.tree, overrides)
    problems = [*content.problems, *overrides.problems]
    settings = None
    try:
        # As JSON, strictly: lists are tuples and words are enumerations, but "9090" is no number and yes is no 1.
        settings = Settings.model_validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as error:
        details = _without_echoes(error.errors(include_url=False))
        problems += [_explain(item, tree, content, overrides) for item in details]
    if problems or settings is None:
        raise ConfigurationError("\n".join(problems))
    return settings


def configuration_file(path: Path | str | None = None, environ: Mapping[str, str] | None = None) -> Path | None:
    """The file that :func:`load_settings` reads; ``None`` where there is none."""
    named = path or (os.environ if environ is None else environ).get(CONFIG_VARIABLE)
    if named:
        return Path(named).expanduser()
    return DEFAULT_FILE if DEFAULT_FILE.exists() else None


def _merged(tree: dict[str, Any], overrides: Overrides) -> dict[str, Any]:
    set_here: dict[str, Any] = {}
    for path, value in overrides.values.items():
        _put(set_here, path, value)
    resolve_model_paths(set_here, Path.cwd())
    for path in overrides.values:
        _put(tree, path, _get(set_here, path))
    return tree


def _put(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for part in path[:-1]:
        inner = tree.setdefault(part, {})
        if not isinstance(inner, dict):
            return  # the file has no section there; that is reported by itself
        tree = inner
    tree[path[-1]] = value


def _get(tree: Any, path: Sequence[str | int]) -> Any:
    for part in path:
        if isinstance(tree, Mapping):
            tree = tree.get(part)
        elif isinstance(tree, list) and isinstance(part, int) and part < len(tree):
            tree = tree[part]
        else:
            return None
    return tree


# --- explaining what is wrong -------------------------------------------------------------------------------------


def _explain(error: ErrorDetails, tree: Any, content: FileContent, overrides: Overrides) -> str:
    location: Location = error["loc"]
    name_is_wrong = bool(location) and location[-1] == "[key]"
    if name_is_wrong:
        location = location[:-1]
    where = _source(location, content, overrides)
    key = ".".join(map(str, location))
    label = f"{where}: {key}" if where and where != key else where or key
    if error["type"] == "extra_forbidden":
        return _unknown_key(label, location, error["input"])
    if error["type"] == "value_error":
        return _contradiction(label, location, error["msg"].removeprefix("Value error, "), content, overrides)
    if error["type"] == "missing":
        return f"{label}: is missing; needed: {_allowed_at(location)}"
    if name_is_wrong:
        return f"{label}: unknown name {location[-1]!r}; {error['msg'].lower()}"
    value = _get(tree, location)
    hint = _near(str(value), choices(schema_at(location)))
    return f"{label}: {_shown(value, location)} is not allowed; allowed: {_allowed_at(location)}{hint}"


def _without_echoes(errors: list[ErrorDetails]) -> list[ErrorDetails]:
    """A list whose items are wrong is also reported as too short; the items say it better."""
    places = [error["loc"] for error in errors]
    return [
        error
        for error in errors
        if error["type"] != "too_short"
        or not any(place != error["loc"] and place[: len(error["loc"])] == error["loc"] for place in places)
    ]


def _source(location: Location, content: FileContent, overrides: Overrides) -> str:
    """What set the value at ``location``: the variable, or the file and line of it or of the nearest key around it."""
    for length in range(len(location), 0, -1):
        start = location[:length]
        for path, variable in overrides.sources.items():
            if path == start:
                return variable
        if start in content.sources:
            return content.sources[start]
    return ""


def _unknown_key(label: str, location: Location, value: Any) -> str:
    siblings = keys_in(location[:-1])
    hint = _near(str(location[-1]), siblings)
    if not hint:
        homonyms = [option.key for option in options() if option.path[-1] == location[-1]]
        hint = f"; did you mean {' or '.join(homonyms)}?" if homonyms else ""
    shown = "" if isinstance(value, dict | list) else f" (its value: {_shown(value, location)})"
    return f"{label}: no such key{shown}; allowed: {', '.join(siblings)}{hint}"


def _contradiction(label: str, location: Location, message: str, content: FileContent, overrides: Overrides) -> str:
    inside = [
        variable
        for path, variable in overrides.sources.items()
        if path[: len(location)] == location and path[-1] in message
    ]
    if not label:  # the settings as a whole: point at the key that the message begins with
        label = _source(tuple(message.split(" ", 1)[0].split(".")), content, overrides)
    start = f"{label}: " if label else ""
    ending = f" (set by {', '.join(inside)})" if inside and label not in inside else ""
    return start + message + ending


def _allowed_at(location: Location) -> str:
    schema = schema_at(location)
    return allowed(schema) if schema is not None else "nothing"


def _shown(value: Any, location: Location) -> str:
    names = [part for part in location if isinstance(part, str)]
    text = "null" if value is None else repr(masked(value, names[-1] if names else ""))
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def _near(word: str, candidates: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, candidates, n=1)
    return f"; did you mean {near[0]}?" if near else ""
