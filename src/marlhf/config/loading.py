"""YAML and dotted overrides -> typed dataclasses, with one clear line for everything that is wrong.

pydantic checks types, bounds and unknown keys; this module words its findings for users.
"""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from marlhf.common.errors import UserError, one_line, requirement
from marlhf.common.paths import text_file
from marlhf.config.yaml_text import parse_yaml

Config = TypeVar("Config")

RENAMED = {"critic.trunk": "critic.backbone"}
"""Keys that were called otherwise in earlier versions."""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds a mapping; raises UserError."""
    try:
        text = text_file(path, "config file").read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"config file {str(path)!r} does not exist") from None
    except UnicodeDecodeError:
        raise UserError(f"config file {str(path)!r} is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"config file {str(path)!r} cannot be read: {error.strerror}") from None
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
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            changes_name = "name" in value and value["name"] != below.get("name")
            value = dict(value) if changes_name else merge(below, value)
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
    key, equals, text = assignment.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"override {assignment!r}: must look like key.sub=value")
    value = parse_yaml(text, f"override {assignment!r}")
    *parents, leaf = key.split(".")
    result = dict(values)
    node = result
    for depth, part in enumerate(parents, 1):
        parent = ".".join(parents[:depth])
        child = node.get(part, (names or {}).get(parent))
        child = {"name": child} if isinstance(child, str) and parent in (names or {}) else child
        if child is not None and not isinstance(child, dict):
            raise UserError(f"override {assignment!r}: {part!r} is {child!r} and has no sub-keys")
        node[part] = dict(child or {})
        node = node[part]
    node[leaf] = value
    return result


def load_config(cls: type[Config], path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key.sub=value` overrides, check everything.

    Raises UserError with one line that names the key, what was given and what is possible.
    """
    return config_from_dict(cls, apply_overrides(cls, read_yaml(path), overrides))


def apply_overrides(cls: Any, values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Plain data for a configuration class with `key.sub=value` on top, a later one
    wins. Raises UserError."""
    names = {
        f.key: json.loads(f.default) if f.default.startswith('"') else None
        for f in config_fields(cls)
        if "text or mapping" in f.type
    }
    for assignment in overrides:
        values = override(values, assignment, names)
    return values


def config_from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """Plain data -> configuration; raises UserError."""
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
        raise UserError(_explain(cls, error)) from None


def config_to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain data that `config_from_dict` reads back."""
    return json.loads(json.dumps(asdict(config)))


def with_new_names(data: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that an earlier version wrote, its keys called as they are today."""
    current = json.loads(json.dumps(data))
    for old, new in RENAMED.items():
        (section, before), (_, after) = old.split("."), new.split(".")
        if before in (current.get(section) or {}):
            current[section][after] = current[section].pop(before)
    return current


def _explain(cls: Any, error: ValidationError) -> str:
    """The first, most telling finding as one line."""
    findings = error.errors()
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
        close = difflib.get_close_matches(location[-1], siblings, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"{key}: unknown key; {hint}Possible: {', '.join(siblings)}"
    if finding["type"] == "missing":
        required = (f.key for f in fields.values() if f.default == "required")
        key = next((k for k in required if k.startswith(f"{key}.")), key)
        return f"{key}: missing; it must be given ({fields[key].description})"
    if finding["type"] == "value_error":
        message = str(finding.get("ctx", {})["error"])
        named = not key or message.startswith(f"{key}.")
        return message if named else f"{key}: {message}"
    given = finding["input"]
    shown = json.dumps(given) if not isinstance(given, str) else repr(given)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    here = [f for f in findings if [str(part) for part in f["loc"]][: len(location)] == location]
    needs = {requirement(f) for f in here if repr(f["input"]) == repr(given)}
    below = _siblings(fields, location) if finding["type"] == "dataclass_type" else []
    keys = f": {', '.join(below)}" if below else ""
    return f"{key}: given {shown}, must be {' or '.join(sorted(needs))}{keys}"


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
    for name, field in cls.__pydantic_fields__.items():
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
        shown = "section" if nested else _type_name(hints[name], field)
        yield ConfigField(key, shown, default, description)
        if nested:
            yield from config_fields(nested, f"{key}.")


def _description(cls: Any, name: str) -> str:
    """The docstring under a field; pydantic forgets those of fields that a class inherits."""
    declared = (vars(owner).get("__pydantic_fields__", {}) for owner in cls.__mro__)
    found = (fields[name].description for fields in declared if name in fields)
    return next((text for text in found if text), "")


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
    """Bounds of a number or of a list's length; those of the machine's integers are not shown."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    found = []
    for item in metadata:
        for constraint in (item, *getattr(item, "metadata", ())):
            bounds = {name: getattr(constraint, name, None) for name in signs}
            found += [
                f" {signs[name]}{bound:g}"
                for name, bound in bounds.items()
                if isinstance(bound, int | float) and abs(bound) < 2**31
            ]
            if isinstance(length := getattr(constraint, "max_length", None), int):
                found.append(f", {length} of them")
    return "".join(found)
