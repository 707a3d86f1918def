"""Settings from a YAML file: the values, and the line each key is on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from shared.settings_schema import keys_in, schema_at

KeyOrIndex = str | int


class _Loader(yaml.SafeLoader):
    """YAML as people write it: ``1e-3`` is a number, as in YAML 1.2; PyYAML by itself reads it as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


@dataclass(slots=True)
class FileContent:
    """What a file holds: its tree, where each key is (``file, line n``), and what is wrong with it."""

    tree: dict[str, Any] = field(default_factory=dict)
    sources: dict[tuple[KeyOrIndex, ...], str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_file(path: Path) -> FileContent:
    """Read a configuration file. An empty one, and an empty section in one, mean that nothing is set there."""
    content = FileContent()
    try:
        loader = _Loader(path.read_bytes())
    except OSError as error:
        content.problems.append(f"{path}: cannot be read: {error.strerror or error}")
        return content
    except yaml.YAMLError as error:
        content.problems.append(_explain(path, error))
        return content
    try:
        root = loader.get_single_node()
        if root is not None:
            _index(root, (), str(path), content, ())
        tree = loader.construct_document(root) if root is not None and not content.problems else {}
    except yaml.YAMLError as error:
        content.problems.append(_explain(path, error))
        return content
    finally:
        loader.dispose()
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        content.problems.append(f"{path}: holds {_name(tree)}; expected the sections {', '.join(keys_in(()))}")
        return content
    content.tree = _without_empty_sections(tree)
    resolve_model_paths(content.tree, path.absolute().parent)
    return content


def _index(
    node: yaml.Node, path: tuple[KeyOrIndex, ...], file: str, content: FileContent, above: tuple[yaml.Node, ...]
) -> None:
    """Note the line of every key; report keys that are there twice, that are not text, or that contain themselves."""
    if any(node is ancestor for ancestor in above):
        content.problems.append(f"{_line(file, node)}: {_dotted(path)}: contains itself")
        return
    for key, line_of, value in _members(node):
        where = _line(file, line_of)
        if not isinstance(key, str | int):
            content.problems.append(f"{where}: the key {line_of.value!r} is not text; put it in quotes")
            continue
        here = (*path, key)
        if here in content.sources:
            content.problems.append(f"{where}: {_dotted(here)}: is there twice, first at {content.sources[here]}")
            continue
        content.sources[here] = where
        _index(value, here, file, content, (*above, node))


def _members(node: yaml.Node) -> Iterator[tuple[Any, yaml.Node, yaml.Node]]:
    if isinstance(node, yaml.SequenceNode):
        for position, item in enumerate(node.value):
            yield position, item, item
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            yield key.value if key.tag == "tag:yaml.org,2002:str" else None, key, value


def _line(file: str, node: yaml.Node) -> str:
    return f"{file}, line {node.start_mark.line + 1}"


def _dotted(path: tuple[KeyOrIndex, ...]) -> str:
    return ".".join(map(str, path))


def _explain(path: Path, error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        parts = [part for part in (error.problem, error.context) if part]
        return f"{path}, line {error.problem_mark.line + 1}: not valid YAML: {' '.join(parts)}"
    return f"{path}: not valid YAML: {' '.join(str(error).split())}"


def _name(value: Any) -> str:
    if isinstance(value, list):
        return "a list"
    return "text" if isinstance(value, str) else f"a {type(value).__name__}"


def _without_empty_sections(tree: dict[str, Any], path: tuple[str, ...] = ()) -> dict[str, Any]:
    """A section whose keys are all commented out reads as null; it means the same as no section."""
    kept: dict[str, Any] = {}
    for key, value in tree.items():
        here = (*path, key)
        schema = schema_at(here)
        if value is None and schema is not None and schema.get("type") == "object":
            continue
        is_section = isinstance(value, dict) and bool(keys_in(here))
        kept[key] = _without_empty_sections(value, here) if is_section else value
    return kept


def resolve_model_paths(tree: Mapping[str, Any], folder: Path) -> None:
    """Make the models' paths absolute, from ``folder``.

    A path that begins with ``.``, ``/`` or ``~`` is a path. Any other is one where something of that name is in
    ``folder``, and the id of a model on a hub where there is not.
    """
    models = tree.get("models")
    catalog = models.get("catalog") if isinstance(models, Mapping) else None
    for spec in catalog.values() if isinstance(catalog, Mapping) else ():
        written = spec.get("path") if isinstance(spec, dict) else None
        if isinstance(written, str) and written:
            spec["path"] = _model_path(written, folder)


def _model_path(written: str, folder: Path) -> str:
    path = folder / Path(written).expanduser()
    surely_a_path = written.startswith(("./", "../", "/", "~")) or written in (".", "..")
    return str(path.resolve()) if surely_a_path or path.exists() else written
