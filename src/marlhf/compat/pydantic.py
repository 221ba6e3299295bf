"""Undocumented parts of pydantic: fields of a dataclass, arguments of its call."""

from __future__ import annotations

from typing import Any

from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo
from pydantic_core import ArgsKwargs

from marlhf.compat import needs


@dataclass
class Probe:
    """A dataclass to check what pydantic's dataclasses have."""

    x: int = 0


# private: __pydantic_fields__ of a dataclass (2.10 to 2.14)
# why: only its FieldInfo has the docstring under a field; that of a model is public, model_fields
# remove when: pydantic gives the fields of a dataclass
@needs("marlhf.compat.pydantic:Probe.__pydantic_fields__")
def fields_of(cls: Any) -> dict[str, FieldInfo]:
    """Fields of a pydantic dataclass, by name; none for other classes."""
    return vars(cls).get("__pydantic_fields__", {})


# private: pydantic_core.ArgsKwargs.kwargs (2.10 to 2.14)
# why: what a dataclass's validator gets when the class is called has no public name
# remove when: pydantic has a name for it
@needs("pydantic_core:ArgsKwargs.kwargs")
def call_arguments(values: Any) -> Any:
    """Keyword arguments of a dataclass's call, as a dict; other values as they are."""
    return dict(values.kwargs or {}) if isinstance(values, ArgsKwargs) else values
