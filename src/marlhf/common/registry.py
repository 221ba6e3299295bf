"""Looks up plug-ins by their names in a configuration.

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
import typing
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic import ConfigDict, PydanticSchemaGenerationError, TypeAdapter, ValidationError

from marlhf.common.errors import UserError, one_line, requirement, shown

Spec = str | dict[str, Any]
_MISSING = object()


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
        """The class, function or callable object behind a name.

        Raises UserError when nothing has that name, or it is not callable.
        """
        found = self._find(name)
        if not callable(found):
            raise UserError(f"{self.kind} {name}: is {shown(found)}, must be callable")
        return found

    def _find(self, name: str) -> Any:
        if name in self.factories:
            return import_path(self.factories[name], self.kind)
        for entry in entry_points(group=self.group):
            if entry.name == name:
                return _load(entry, self.kind)
        if "." in name:
            return import_path(name, self.kind)
        close = difflib.get_close_matches(name, self.names(), 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(
            f"{self.kind}: no {self.kind} is called {name!r}; {hint}Possible: "
            f"{', '.join(self.names())}, or an import path such as my_package.module.Name"
        )


def import_path(path: str, kind: str) -> Any:
    """Import `package.module.name`; raises UserError that says which part is missing."""
    module_name, _, attribute = path.rpartition(".")
    if not module_name or not all(part.isidentifier() for part in path.split(".")):
        raise UserError(f"{kind}: {path!r} is not an import path such as my_package.module.Name")
    with _foreign(f"{kind}: cannot import {path!r}", module_name):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise UserError(f"{kind}: cannot import {path!r}: {error}") from error
        found = getattr(module, attribute, _MISSING)
    if found is _MISSING:
        raise UserError(f"{kind}: module {module_name!r} has no {attribute!r}")
    return found


def _load(entry: EntryPoint, kind: str) -> Any:
    with _foreign(f"{kind} {entry.name}: cannot import {entry.value!r}", entry.value):
        return entry.load()


def _foreign(where: str, module: str) -> AbstractContextManager[None]:
    """Wrap an import: errors in a module outside this library become a UserError."""
    if module.startswith("marlhf."):
        return nullcontext()
    from marlhf.common.plugins import called  # which needs torch

    return called(where)


def split_spec(spec: Spec, kind: str) -> tuple[str, dict[str, Any]]:
    """A spec's name and arguments."""
    if isinstance(spec, str):
        return spec, {}
    arguments = dict(spec)
    name = arguments.pop("name", None)
    if not isinstance(name, str):
        raise UserError(
            f"{kind}: given {one_line(spec, 80)}, but a mapping needs a `name`, a text, beside its "
            "arguments"
        )
    return name, arguments


def spec_label(spec: Any) -> str:
    """Display name of a spec: `ngram(n=3)`, `union(of=[ngram(n=10), line])`."""
    if isinstance(spec, list | tuple):
        return f"[{', '.join(map(spec_label, spec))}]"
    if not isinstance(spec, Mapping):
        return str(spec)
    given = ", ".join(f"{k}={spec_label(v)}" for k, v in spec.items() if k != "name")
    name = str(spec.get("name", ""))
    return f"{name}({given})" if given else name


def construct(factory: Callable[..., Any], arguments: Mapping[str, Any], where: str) -> Any:
    """Call a class with arguments from YAML; every fault becomes one UserError line.

    For dataclasses, argument types are checked in addition to names. The object must be callable,
    as every plug-in is.
    """
    try:
        signature = inspect.signature(factory)
    except ValueError:  # a class written in C
        raise UserError(f"{where}: Python knows no parameters of {shown(factory)}") from None
    try:
        signature.bind(**arguments)
    except TypeError:
        given = ", ".join(arguments) or "no argument"
        known = ", ".join(signature.parameters) or "none"
        raise UserError(f"{where}: given {given}; its parameters are {known}") from None
    from marlhf.common.plugins import called  # which needs torch

    with called(where):
        try:
            checked = _check_types(factory, arguments) if inspect.isclass(factory) else arguments
            built = factory(**checked)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    if not callable(built):
        raise UserError(f"{where}: an object of {type(built).__name__} cannot be called")
    return built


def _check_types(cls: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments checked against a dataclass's annotations; lists become tuples where required."""
    if not dataclasses.is_dataclass(cls):
        return dict(arguments)
    hints = _type_hints(cls)
    checked = dict(arguments)
    for name in arguments.keys() & hints.keys():
        try:
            adapter = TypeAdapter(
                hints[name], config=ConfigDict(strict=True, arbitrary_types_allowed=True)
            )
        except PydanticSchemaGenerationError:  # a type of the user's that pydantic cannot check
            continue
        value = arguments[name]
        as_tuple = isinstance(value, list) and typing.get_origin(hints[name]) is tuple
        try:
            checked[name] = adapter.validate_python(tuple(value) if as_tuple else value)
        except ValidationError as error:
            needs = sorted({requirement(finding) for finding in error.errors()})
            raise UserError(f"{name}: given {shown(value)}, must be {' or '.join(needs)}") from None
    return checked


def _type_hints(cls: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except (NameError, TypeError):
        return {}
