"""Properties of the configuration: file, environment, refusal, defaults."""

import json
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from shared.errors import ConfigurationError
from shared.settings import Settings
from shared.settings_loader import load_settings
from shared.settings_schema import Option, Schema, is_optional, keys_in, options, resolve, variable_of, without_null

pytestmark = pytest.mark.property
EXAMPLES = hypothesis_settings(max_examples=100, deadline=None, derandomize=True)

# Options whose validity depends on others, or that are not shown, are tested by example.
RELATED = {
    "optimization.batcher.min_batch_size",
    "optimization.batcher.max_batch_size",
    "optimization.batcher.length_buckets",
    "optimization.deepspeed.zero_offload",
    "optimization.engine_preference",
    "optimization.pytorch.compile_load_high",
    "optimization.pytorch.compile_load_low",
    "monitoring.anomaly.alert_destinations",
    "monitoring.server.preload_models",
    "models.catalog",
    "fleet.tenants",
    "fleet.signing_key",
}
INDEPENDENT = [option for option in options() if option.key not in RELATED]
TEXTS = {
    r"^(redis|rediss|unix|redis\+socket|sentinel)://": st.sampled_from(
        ["redis://h:1/0", "rediss://:p@h", "unix:///s", "redis+socket:///s", "sentinel://h:1,i:2/0?master=m"]
    ),
    "^https?://": st.sampled_from(["http://a:1", "https://b/c"]),
    "^/": st.sampled_from(["/", "/x/y"]),
    r"^(auto|cpu|cuda(:\d+)?)$": st.sampled_from(["auto", "cpu", "cuda", "cuda:3"]),
}


def valid(schema: Schema) -> st.SearchStrategy:
    """Values that an option accepts."""
    schema = resolve(schema)
    if is_optional(schema):
        return st.none() | valid(without_null(schema))
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kind = schema["type"]
    if kind == "boolean":
        return st.booleans()
    if kind == "integer":
        return st.integers(schema.get("minimum", -1000), schema.get("maximum", 10**6))
    if kind == "number":
        low, high = schema.get("minimum", schema.get("exclusiveMinimum", 0)), schema.get("maximum", 10**6)
        return st.floats(low, high, exclude_min="exclusiveMinimum" in schema, allow_subnormal=False)
    if kind == "array":
        return st.lists(valid(schema["items"]), min_size=schema.get("minItems", 0), max_size=4)
    if kind == "object":
        return st.dictionaries(st.text("abc_", min_size=1, max_size=4), st.integers() | st.booleans(), max_size=3)
    if "pattern" in schema:
        return TEXTS[schema["pattern"]]
    return st.text("abcXYZ019-_./é", min_size=1, max_size=12).filter(lambda text: text.lower() not in ("null", "none"))


def invalid(schema: Schema) -> st.SearchStrategy:
    """Values that an option refuses."""
    schema = resolve(schema)
    inner = without_null(schema)
    wrong: list = [["a", 1] if inner.get("type") == "object" else {"a": 1}]
    if not is_optional(schema):
        wrong.append(None)
    if "enum" in inner:
        wrong += ["no-such-word", 3]
    elif inner["type"] == "boolean":
        wrong += ["true", 1, "maybe"]
    elif inner["type"] in ("integer", "number"):
        wrong += ["1", True, float("nan"), [1]]
        wrong += [inner["minimum"] - 1] if "minimum" in inner else []
        wrong += [inner["exclusiveMinimum"]] if "exclusiveMinimum" in inner else []
        wrong += [inner["maximum"] + 1] if "maximum" in inner else []
    elif inner["type"] == "array":
        wrong += ["a", [{}], [None]]
    elif inner["type"] == "object":
        wrong += ["a", 1]
    else:
        wrong += [1, ["x"]] + (["no match"] if "pattern" in inner else [])
    return st.sampled_from(wrong)


def chosen(values) -> st.SearchStrategy:
    """A few options, each with a value: ``{option: value}``."""
    return st.lists(st.sampled_from(INDEPENDENT), unique_by=lambda option: option.key, max_size=12).flatmap(
        lambda some: st.tuples(*(values(option.schema) for option in some)).map(
            lambda drawn: list(zip(some, drawn, strict=True))
        )
    )


def tree_of(assignments: list[tuple[Option, object]]) -> dict:
    """The tree that a file with these options holds."""
    tree: dict = {}
    for option, value in assignments:
        inner = tree
        for part in option.path[:-1]:
            inner = inner.setdefault(part, {})
        inner[option.path[-1]] = value
    return tree


def as_text(value: object) -> str:
    """A value as it is written in a variable."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return ",".join(map(as_text, value))
    return value if isinstance(value, str) else json.dumps(value)


def load(tree: object, environ: dict[str, str] | None = None) -> Settings:
    """The settings under this file and these variables."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "settings.yaml"
        path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
        return load_settings(path, environ or {})


def value_at(settings: Settings, option: Option) -> object:
    """What the settings hold for an option; lists for tuples."""
    value: object = settings
    for part in option.path:
        value = getattr(value, part)
    return list(value) if isinstance(value, tuple) else value


# Feature: advanced-optimization-monitoring, Property 54: what a file says is what is set
@EXAMPLES
@given(chosen(valid))
def test_what_a_file_says_is_what_is_set(assignments):
    """Whatever valid values a file holds, the settings have exactly these."""
    settings = load(tree_of(assignments))

    assert [value_at(settings, option) for option, _ in assignments] == [value for _, value in assignments]


# Feature: advanced-optimization-monitoring, Property 55: the environment wins over the file
@EXAMPLES
@given(chosen(valid), st.data())
def test_the_environment_wins(assignments, data):
    """For every option that a file and a variable set, under any of its names, the variable's value counts."""
    environ, expected = {}, []
    for option, _ in assignments:
        value = data.draw(valid(option.schema))
        name = data.draw(st.sampled_from(option.variables))
        environ[name] = as_text(value)
        expected.append(value)

    settings = load(tree_of(assignments), environ)

    assert [value_at(settings, option) for option, _ in assignments] == expected


# Feature: advanced-optimization-monitoring, Property 56: what is wrong is refused by name
@EXAMPLES
@given(chosen(valid), st.data())
def test_an_invalid_value_is_refused_by_name(assignments, data):
    """One wrong value anywhere is refused, and the single line about it names the key and what is allowed."""
    option = data.draw(st.sampled_from(INDEPENDENT))
    value = data.draw(invalid(option.schema))
    rest = [(other, kept) for other, kept in assignments if other.key != option.key]

    with pytest.raises(ConfigurationError) as caught:
        load(tree_of([*rest, (option, value)]))

    (line,) = caught.value.message.splitlines()
    assert option.key in line
    assert "settings.yaml, line " in line
    assert "allowed: " in line


# Feature: advanced-optimization-monitoring, Property 56: what is wrong is refused by name
@EXAMPLES
@given(st.sampled_from(INDEPENDENT), st.text("abcdefgh_", min_size=1, max_size=12), st.booleans())
def test_an_unknown_name_is_refused(option, name, in_file):
    """A key or variable that does not exist is refused, wherever it is."""
    section = option.path[:-1]
    assume(name not in keys_in(section))
    variable = variable_of((*section, name))
    assume(variable not in {known for other in options() for known in other.variables})

    tree: dict = {name: 1}
    for part in reversed(section):
        tree = {part: tree}

    with pytest.raises(ConfigurationError) as caught:
        load(tree if in_file else {}, {} if in_file else {variable: "1"})

    (line,) = caught.value.message.splitlines()
    assert (name if in_file else variable) in line
    assert "no such key" in line or "no such variable" in line


# Feature: advanced-optimization-monitoring, Property 57: what is left out has its default
@EXAMPLES
@given(chosen(valid))
def test_what_is_not_set_has_its_default(assignments):
    """Every option that the file leaves out has the documented default."""
    settings = load(tree_of(assignments))

    named = {option.key for option, _ in assignments}
    left_out = [option for option in options() if option.key not in named]
    assert [value_at(settings, option) for option in left_out] == [value_at(Settings(), option) for option in left_out]
