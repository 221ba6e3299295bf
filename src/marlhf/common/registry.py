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
import functools
import importlib
import importlib.util
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

from pydantic import ConfigDict, PydanticSchemaGenerationError, TypeAdapter, ValidationError

from marlhf.common.errors import UserError, did_you_mean, one_line, requirement, short_repr

Spec = str | dict[str, Any]
_MISSING = object()
_DEFERRED = {  # functions whose call only prepares their work
    "an async": (inspect.iscoroutinefunction, inspect.isasyncgenfunction),
    "a generator": (inspect.isgeneratorfunction,),
}


@dataclasses.dataclass
class Registry:
    """Short names for one kind of plug-in.

    kind        what an error message calls them: "segmenter"
    group       the entry point group that other packages register in
    factories   name -> import path of a class or function
    arguments   what `build` checks that a plug-in can be called with; None: not checked
    """

    kind: str
    group: str
    factories: dict[str, str]
    arguments: tuple[str, ...] | None = None

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
        factory = self._find(name)
        if not callable(factory):
            raise UserError(f"{self.kind} {name}: is {short_repr(factory)}, must be callable")
        return factory

    def build(self, spec: Any) -> Any:
        """Build a plug-in from a name, import path, mapping with `name`, class or callable.

        A class is built with the mapping's other keys, if any; a plain function is used as it is
        and takes no arguments. Raises UserError.
        """
        plugin = self._build(spec)
        if self.arguments is not None:
            where = f"{self.kind} {spec}" if isinstance(spec, str) else self.label(plugin)
            check_call(plugin, where, self.arguments)
        return plugin

    def label(self, plugin: Any) -> str:
        """A plug-in as messages call it: `estimator GAE`."""
        return f"{self.kind} {plugin_name(plugin)}"

    def _build(self, spec: Any) -> Any:
        kind = self.kind
        if isinstance(spec, type):
            return construct(spec, {}, f"{kind} {spec.__name__}")
        if not isinstance(spec, str | dict):
            if not callable(spec):
                raise UserError(
                    f"{kind}: given {short_repr(spec)}, must be a name, a mapping or a callable"
                )
            return spec
        name, arguments = split_spec(spec, kind)
        factory = self.find(name)
        if isinstance(factory, type):
            return construct(factory, arguments, f"{kind} {name}")
        if arguments:
            raise UserError(
                f"{kind} {name}: is not a class and takes no arguments; given "
                f"{', '.join(arguments)}"
            )
        return factory

    def _find(self, name: str) -> Any:
        if name in self.factories:
            return import_path(self.factories[name], self.kind)
        for entry in entry_points(group=self.group):
            if entry.name == name:
                return _load(entry, self.kind)
        if "." in name:
            return import_path(name, self.kind)
        hint = did_you_mean(name, self.names())
        raise UserError(
            f"{self.kind}: no {self.kind} is called {name!r}; {hint}Possible: "
            f"{', '.join(self.names())}, or an import path such as my_package.module.Name"
        )


def import_path(path: str, kind: str) -> Any:
    """Import `package.module.name`. Raises UserError, naming the part that is missing."""
    module_name, _, attribute = path.rpartition(".")
    if not module_name or not all(part.isidentifier() for part in path.split(".")):
        raise UserError(f"{kind}: {path!r} is not an import path such as my_package.module.Name")
    with _foreign(f"{kind}: cannot import {path!r}", module_name):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise UserError(f"{kind}: cannot import {path!r}: {error}") from error
        member = getattr(module, attribute, _MISSING)
        is_module = isinstance(member, ModuleType)
        if member is _MISSING and hasattr(module, "__path__"):
            is_module = importlib.util.find_spec(path) is not None
    if is_module:
        raise UserError(f"{kind}: {path!r} is a module; name a callable in it: {path}.Name")
    if member is _MISSING:
        raise UserError(f"{kind}: module {module_name!r} has no {attribute!r}")
    return member


def _load(entry: EntryPoint, kind: str) -> Any:
    with _foreign(f"{kind} {entry.name}: cannot import {entry.value!r}", entry.value):
        return entry.load()


def _foreign(where: str, module: str) -> AbstractContextManager[None]:
    """Wrap an import: errors in a module outside this library become a UserError."""
    if module.startswith("marlhf."):
        return nullcontext()
    from marlhf.common.plugins import plugin_call  # which needs torch

    return plugin_call(where)


def split_spec(spec: Spec, kind: str) -> tuple[str, dict[str, Any]]:
    """A spec's name and arguments."""
    if isinstance(spec, str):
        return spec, {}
    arguments = dict(spec)
    name = arguments.pop("name", None)
    if not isinstance(name, str):
        raise UserError(
            f"{kind}: given {one_line(spec, 80)}, but a mapping needs a `name`, a text, in "
            "addition to its arguments"
        )
    return name, arguments


def without_arguments(function: Any) -> Any:
    """The callable in a `functools.partial`; any other as it is."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def plugin_name(plugin: Any) -> str:
    """Name of a function or class, else of the object's class."""
    plugin = without_arguments(plugin)
    return getattr(plugin, "__name__", None) or type(plugin).__name__


def spec_label(spec: Any) -> str:
    """Display name of a spec: `ngram(n=3)`, `union(of=[ngram(n=10), line])`."""
    if isinstance(spec, list | tuple):
        return f"[{', '.join(map(spec_label, spec))}]"
    if not isinstance(spec, Mapping):
        return str(spec)
    arguments = ", ".join(f"{k}={spec_label(v)}" for k, v in spec.items() if k != "name")
    name = str(spec.get("name", ""))
    return f"{name}({arguments})" if arguments else name


def check_call(
    function: Any, where: str, positional: Sequence[str], named: Iterable[str] = ()
) -> None:
    """Check that a plug-in takes these arguments, and returns its result when it is called.

    A plug-in whose parameters Python cannot inspect passes. Raises UserError, naming `where`.
    """
    code = without_arguments(function)
    if not inspect.isroutine(code):
        code = type(code).__call__
    for kind, tests in _DEFERRED.items():
        if any(test(code) for test in tests):
            raise UserError(f"{where}: is {kind} function, must return its result when called")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C
        return
    named = list(named)
    try:
        signature.bind(*positional, **dict.fromkeys(named))
    except TypeError as error:
        parameters = ", ".join(signature.parameters) or "none"
        raise UserError(
            f"{where}: is called with {', '.join([*positional, *named])}, but its parameters are "
            f"{parameters}: {one_line(error)}"
        ) from None


def construct(factory: Callable[..., Any], arguments: Mapping[str, Any], where: str) -> Any:
    """Call a class with arguments from YAML; every fault becomes one UserError line.

    For dataclasses, argument types are checked in addition to names. The object must be callable,
    as every plug-in is.
    """
    check_names(factory, arguments, where)
    from marlhf.common.plugins import plugin_call  # which needs torch

    with plugin_call(where):
        try:
            checked = _check_types(factory, arguments) if inspect.isclass(factory) else arguments
            built = factory(**checked)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    if not callable(built):
        raise UserError(f"{where}: an object of {type(built).__name__} cannot be called")
    return built


def check_names(factory: Callable[..., Any], arguments: Mapping[str, Any], where: str) -> None:
    """Check that a class takes arguments of these names. Raises UserError, naming `where`."""
    try:
        signature = inspect.signature(factory)
    except ValueError:  # a class written in C
        raise UserError(
            f"{where}: the parameters of {short_repr(factory)} cannot be inspected"
        ) from None
    try:
        signature.bind(**arguments)
    except TypeError:
        names = ", ".join(arguments) or "no argument"
        parameters = ", ".join(signature.parameters) or "none"
        raise UserError(f"{where}: given {names}; its parameters are {parameters}") from None


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
            raise UserError(
                f"{name}: given {short_repr(value)}, must be {' or '.join(needs)}"
            ) from None
    return checked


def _type_hints(cls: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except (NameError, TypeError):
        return {}
