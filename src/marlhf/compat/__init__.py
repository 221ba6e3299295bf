"""Every private or undocumented name of another library, behind functions of our own.

One file per library, one function per thing. A function says in comments which private name it
needs (and in which versions that was seen), why no public way does, and what would let it go.
`needs` checks the names when the file is imported: an upgrade that renames one fails at the start
of a run, by name, and not as a wrong number hours later.
"""

from __future__ import annotations

import dis
import importlib
import importlib.metadata
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

_MISSING: Any = object()

NEEDED: list[str] = []
"""Every name that was checked, as given to `needs`; `tests/test_private_apis.py` reads it."""


class IncompatibleError(ImportError):
    """An installed library lacks a private name that marlhf needs, or has changed it."""


def needs(*names: str) -> Callable[[Function], Function]:
    """Declare and check the private names that a function uses.

    Each name is `module:Class.attribute` or `module:function`, with the parameters that it must
    have in parentheses, if they matter: `module:Class.method(self, x)`. An attribute that only
    instances have is found by the assignment in one of the class's methods.

    Raises IncompatibleError.
    """
    for name in names:
        check(name)
        NEEDED.append(name)
    return lambda function: function


def check(name: str) -> None:
    """Raise IncompatibleError unless a name exists, with the parameters given."""
    path, _, parameters = name.partition("(")
    module, _, attributes = path.partition(":")
    value: Any = importlib.import_module(module)
    for attribute in attributes.split("."):
        owner, value = value, getattr(value, attribute, _MISSING)
        if value is _MISSING:
            if _is_set_on_instances(owner, attribute):
                return
            raise IncompatibleError(f"{_version(module)} has no {path}; {_ADVICE}")
    if parameters:
        expected = parameters.rstrip(")").replace(",", " ").split()
        present = [p.name for p in inspect.signature(value).parameters.values()]
        if present != ["args", "kwargs"] and present[: len(expected)] != expected:  # of a wrapper
            raise IncompatibleError(
                f"{_version(module)}: {path} takes ({', '.join(present)}), not "
                f"({', '.join(expected)}); {_ADVICE}"
            )


_ADVICE = "install a version within the bounds of marlhf's pyproject.toml"


def _is_set_on_instances(owner: Any, attribute: str) -> bool:
    methods = (vars(part).values() for part in getattr(owner, "__mro__", ()))
    codes = (getattr(method, "__code__", None) for part in methods for method in part)
    return any(
        (instruction.opname, instruction.argval) == ("STORE_ATTR", attribute)
        for code in codes
        if code is not None and attribute in code.co_names
        for instruction in dis.get_instructions(code)
    )


def _version(module: str) -> str:
    library = module.removeprefix(f"{__name__}.").partition(".")[0]
    try:
        return f"{library} {importlib.metadata.version(library)}"
    except importlib.metadata.PackageNotFoundError:
        return library
