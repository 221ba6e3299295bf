"""Names in a configuration -> objects.

A plug-in (segmenter or reward) is named in YAML as a string or as a mapping with `name` and its
arguments:

    segmenter: ngram
    segmenter: {name: ngram, n: 3}
    segmenter: my_package.my_module.MySegmenter

A name is looked up among the built-in ones, then among installed entry points, then imported.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from marlhf.types import UserError

Spec = str | dict[str, Any]


@dataclasses.dataclass
class Registry:
    """Short names for one kind of plug-in.

    kind        what an error message calls them: "segmenter"
    group       the entry point group that other packages register in
    factories   name -> import path of a class or function
    """

    kind: str
    group: str
    factories: dict[str, str]

    def names(self) -> list[str]:
        """Every short name, built in or installed."""
        return sorted({*self.factories, *(e.name for e in entry_points(group=self.group))})

    def register(self, name: str, path: str) -> None:
        """Add a short name for an import path, for this process."""
        self.factories[name] = path

    def find(self, name: str) -> Any:
        """The class, function or object behind a name.

        Raises UserError when nothing has that name.
        """
        if name in self.factories:
            return import_path(self.factories[name], self.kind)
        for entry in entry_points(group=self.group):
            if entry.name == name:
                return entry.load()
        if "." in name:
            return import_path(name, self.kind)
        close = difflib.get_close_matches(name, self.names(), 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(
            f"{self.kind}: no {self.kind} is called {name!r}{hint} Possible: "
            f"{', '.join(self.names())}, or an import path such as my_package.module.Name"
        )


def import_path(path: str, kind: str) -> Any:
    """Import `package.module.name`; raises UserError that says which part is missing."""
    module_name, _, attribute = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"{kind}: cannot import {path!r}: {error}") from error
    except ValueError as error:  # a leading dot
        raise UserError(f"{kind}: {path!r} is not an import path") from error
    if not hasattr(module, attribute):
        raise UserError(f"{kind}: module {module_name!r} has no {attribute!r}")
    return getattr(module, attribute)


def split_spec(spec: Spec, kind: str) -> tuple[str, dict[str, Any]]:
    """A spec's name and arguments."""
    if isinstance(spec, str):
        return spec, {}
    arguments = dict(spec)
    name = arguments.pop("name", None)
    if not isinstance(name, str):
        raise UserError(
            f"{kind}: given {spec!r}, but a mapping needs a `name`, such as {{name: ngram, n: 5}}"
        )
    return name, arguments


def construct(factory: Callable[..., Any], arguments: Mapping[str, Any], where: str) -> Any:
    """Call a class with arguments from YAML; every fault becomes one UserError line.

    Dataclasses have their argument types checked as well as their names.
    """
    try:
        signature = inspect.signature(factory)
        signature.bind(**arguments)
    except TypeError:
        known = [n for n in signature.parameters if n != "self"]
        given = ", ".join(arguments) or "no argument"
        raise UserError(
            f"{where}: given {given}; its parameters are {', '.join(known) or 'none'}"
        ) from None
    try:
        if dataclasses.is_dataclass(factory):
            arguments = _checked(factory, arguments)
        return factory(**arguments)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{where}.{key}: given {first['input']!r}; {first['msg']}") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {error}") from error


def _checked(cls: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments validated one by one against the dataclass's annotations."""
    hints = inspect.get_annotations(cls, eval_str=False)
    resolved = _type_hints(cls)
    config = ConfigDict(strict=True, arbitrary_types_allowed=True)
    checked = {}
    for name, value in arguments.items():
        hint = resolved.get(name, hints.get(name))
        if hint is None:
            checked[name] = value
            continue
        try:
            adapter = TypeAdapter(hint, config=config)
        except Exception:  # a type that pydantic has no schema for
            checked[name] = value
            continue
        value = tuple(value) if isinstance(value, list) else value
        try:
            checked[name] = adapter.validate_python(value)
        except ValidationError as error:
            first = dict(error.errors()[0])
            raise UserError(f"{name}: given {value!r}; {first['msg']}") from None
    return checked


def _type_hints(cls: Any) -> dict[str, Any]:
    import typing

    try:
        return typing.get_type_hints(cls)
    except (NameError, TypeError):
        return {}
