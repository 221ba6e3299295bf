"""YAML and dotted overrides -> typed dataclasses, with one-line errors.

pydantic checks types, bounds and unknown keys; this module words its findings for users.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from marlhf.common.errors import UserError, did_you_mean, one_line, requirement
from marlhf.common.paths import text_file
from marlhf.compat.pydantic import fields_of
from marlhf.config.yaml_text import parse_yaml

Config = TypeVar("Config")

RENAMED = {"critic.trunk": "critic.backbone"}
"""Keys that had another name in earlier versions."""
RENAMED_VALUES = {("preset", "reference"): "paper_code"}
"""Values that had another name in earlier versions: (key, old value) -> new value."""


_LONGEST = 2**20  # characters of a configuration; a command may write without end


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file, or a shell's `<(command)`, that holds a mapping.

    Raises UserError.
    """
    try:
        with text_file(path, "config file", streams=True).open(encoding="utf-8") as file:
            text = file.read(_LONGEST + 1)
    except FileNotFoundError:
        raise UserError(f"config file {str(path)!r} does not exist") from None
    except UnicodeDecodeError:
        raise UserError(f"config file {str(path)!r} is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"config file {str(path)!r} cannot be read: {error.strerror}") from None
    if len(text) > _LONGEST:
        raise UserError(f"config file {str(path)!r} has more than {_LONGEST} characters")
    values = parse_yaml(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        holds = "a list" if isinstance(values, list) else repr(values)
        raise UserError(f"{path}: must hold `key: value` lines, holds {one_line(holds, 60)}")
    return values


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, mapping by mapping; a mapping that changes its `name` replaces."""
    merged = dict(base)
    for key, value in over.items():
        base_value = merged.get(key)
        if isinstance(base_value, Mapping) and isinstance(value, Mapping):
            changes_name = "name" in value and value["name"] != base_value.get("name")
            value = dict(value) if changes_name else merge(base_value, value)
        merged[key] = value
    return merged


def override(
    values: dict[str, Any], assignment: str, names: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Apply one `key.sub=value`; the value is read as YAML.

    names: the keys that hold a name or a mapping, with their default names or None. Such a name
    may be opened up: after `segmenter: ngram` (written, or by default), `segmenter.n=3` makes it
    `{name: ngram, n: 3}`.
    """
    quoted = one_line(repr(assignment), 80)
    key, equals, text = assignment.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"override {quoted}: must look like key.sub=value")
    parsed = parse_yaml(text, f"override {quoted}")
    *parents, leaf = key.split(".")
    result = dict(values)
    node = result
    for depth, part in enumerate(parents, 1):
        parent = ".".join(parents[:depth])
        child = node.get(part, (names or {}).get(parent))
        child = {"name": child} if isinstance(child, str) and parent in (names or {}) else child
        if child is not None and not isinstance(child, dict):
            value = one_line(repr(child), 60)
            raise UserError(f"override {quoted}: {part!r} is {value} and has no sub-keys")
        node[part] = dict(child or {})
        node = node[part]
    node[leaf] = parsed
    return result


def load_config(cls: type[Config], path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key.sub=value` overrides, check everything.

    Raises UserError with one line that names the key, what was given and what is possible.
    """
    return config_from_dict(cls, apply_overrides(cls, read_yaml(path), overrides))


def apply_overrides(cls: Any, values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply `key.sub=value` overrides to plain data; a later one wins. Raises UserError."""
    names = {
        f.key: json.loads(f.default) if f.default.startswith('"') else None
        for f in config_fields(cls)
        if "text or mapping" in f.type
    }
    for assignment in overrides:
        values = override(values, assignment, names)
    return values


def check_kind(config: Any, cls: type) -> None:
    """Check that a job was given its own configuration. Raises UserError."""
    if not isinstance(config, cls):
        name = cls.__name__
        raise UserError(
            f"config: given a {type(config).__name__}, must be a {name}; "
            f"load_config({name}, 'my_run.yaml') reads a file, config_from_dict a dict"
        )


def config_from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """Plain data -> configuration. Raises UserError."""
    try:
        text = json.dumps(values, default=str, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(
            "config: a text in it holds half of a character (a lone surrogate)"
        ) from None
    except (TypeError, ValueError, RecursionError) as error:  # a key that is a date; a loop
        raise UserError(f"config: holds what a configuration cannot: {error}") from None
    try:
        return TypeAdapter(cls).validate_json(text)
    except ValidationError as error:
        raise UserError(_abridged(_explain(cls, error))) from None


def config_to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain data that `config_from_dict` reads back."""
    return json.loads(json.dumps(asdict(config)))


def with_new_names(data: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the keys and values of a configuration from an earlier version."""
    current = json.loads(json.dumps(data))
    for old, new in RENAMED.items():
        (section, before), (_, after) = old.split("."), new.split(".")
        if isinstance(current.get(section), dict) and before in current[section]:
            current[section][after] = current[section].pop(before)
    for (key, old), new in RENAMED_VALUES.items():
        if current.get(key) == old:
            current[key] = new
    return current


def _abridged(text: str) -> str:
    """Shorten a long message in the middle, so that key and possible values remain."""
    return text if len(text) <= 800 else f"{text[:300]}...{text[-300:]}"


def _explain(cls: Any, error: ValidationError) -> str:
    """Describe the most telling finding in one line."""
    findings = error.errors()
    if findings[0]["type"] == "json_invalid":  # pydantic's parser has a limit
        return "config: lists and mappings in it are nested too deeply"
    unknown = [f for f in findings if f["type"] == "unexpected_keyword_argument"]
    of_one_key = [f for f in findings if f["loc"][:1] == findings[0]["loc"][:1]]
    telling = [f for f in of_one_key if f["type"] == "value_error"]  # in one form of several
    finding = (unknown or telling or findings)[0]
    fields = {field.key: field for field in config_fields(cls)}
    location = [str(part) for part in finding["loc"]]
    key = ".".join(location)
    while key not in fields and not unknown and len(location) > 1:
        location.pop()  # pydantic adds the union member or list index that it tried
        key = ".".join(location)
    if key in RENAMED:
        return f"{key}: is called {RENAMED[key]} now"
    if unknown:
        siblings = _siblings(fields, location[:-1])
        hint = did_you_mean(location[-1], siblings)
        return f"{key}: unknown key; {hint}Possible: {', '.join(siblings)}"
    if finding["type"] == "missing":
        required = (f.key for f in fields.values() if f.default == "required")
        key = next((k for k in required if k.startswith(f"{key}.")), key)
        return f"{key}: missing; it must be given ({fields[key].description})"
    if finding["type"] == "value_error":
        message = str(finding.get("ctx", {})["error"])
        if not key or message.startswith(f"{key}."):
            return message
        inside = f"{key}.{message.partition(':')[0]}" in fields
        return f"{key}.{message}" if inside else f"{key}: {message}"
    value = finding["input"]
    if isinstance(value, str) and (key, value) in RENAMED_VALUES:
        return f"{key}: {value!r} is called {RENAMED_VALUES[key, value]!r} now"
    quoted = json.dumps(value) if not isinstance(value, str) else repr(value)
    quoted = quoted if len(quoted) <= 80 else quoted[:77] + "..."
    at_key = [f for f in findings if [str(part) for part in f["loc"]][: len(location)] == location]
    kind, text = type(value), repr(value)
    needs = {
        requirement(f) for f in at_key if type(f["input"]) is kind and repr(f["input"]) == text
    }
    subkeys = _siblings(fields, location) if finding["type"] == "dataclass_type" else []
    keys = f": {', '.join(subkeys)}" if subkeys else ""
    return f"{key}: given {quoted}, must be {' or '.join(sorted(needs))}{keys}"


def _siblings(fields: Mapping[str, ConfigField], parent: Sequence[str]) -> list[str]:
    prefix = "".join(f"{p}." for p in parent)
    below = {k.removeprefix(prefix).split(".")[0] for k in fields if k.startswith(prefix)}
    return sorted(below - {""})


@dataclass(frozen=True)
class ConfigField:
    """One line of `--help`: dotted key, type, default as YAML, meaning."""

    key: str
    type: str
    default: str
    description: str


def config_fields(cls: Any, prefix: str = "") -> Iterator[ConfigField]:
    """Every key of a configuration class, sections before their keys."""
    hints = typing.get_type_hints(cls, include_extras=True)
    for name, field in fields_of(cls).items():
        key = f"{prefix}{name}"
        nested = _nested(hints[name])
        if field.is_required():
            default = "required"
        elif nested:
            default = ""
        else:
            value = field.get_default(call_default_factory=True)
            default = json.dumps(value)
        description = " ".join(_description(cls, name).split())
        type_name = "section" if nested else _type_name(hints[name], field)
        yield ConfigField(key, type_name, default, description)
        if nested:
            yield from config_fields(nested, f"{key}.")


def _description(cls: Any, name: str) -> str:
    """The docstring under a field; pydantic forgets those of fields that a class inherits."""
    declared = (fields_of(owner) for owner in cls.__mro__)
    texts = (fields[name].description for fields in declared if name in fields)
    return next((text for text in texts if text), "")


def _nested(hint: Any) -> Any:
    """The settings class inside `X` or `X | None`, if there is one."""
    for part in (hint, *typing.get_args(hint)):
        if isinstance(part, type) and is_dataclass(part):
            return part
    return None


def _type_name(hint: Any, field: Any = None) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        base = _type_name(arguments[0])
        return base + _bounds(arguments[1:])
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        names = [_type_name(a) for a in arguments if a is not type(None)]
        null = ["null"] if type(None) in arguments else []
        return " or ".join(names + null)
    if origin in (list, tuple):
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return "mapping"
    return {str: "text", int: "int", float: "float", bool: "true|false"}.get(hint, str(hint))


def _bounds(metadata: Sequence[Any]) -> str:
    """Bounds of a number or of a list's length, without those of 32-bit integers."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounded = []
    for item in metadata:
        for constraint in (item, *getattr(item, "metadata", ())):
            bounds = {name: getattr(constraint, name, None) for name in signs}
            bounded += [
                f" {signs[name]}{bound:g}"
                for name, bound in bounds.items()
                if isinstance(bound, int | float) and abs(bound) < 2**31
            ]
            if isinstance(length := getattr(constraint, "max_length", None), int):
                bounded.append(f", {length} of them")
    return "".join(bounded)
