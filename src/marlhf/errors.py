"""The error that is the user's to mend, and how it is worded."""

from __future__ import annotations

import argparse
import importlib
import os
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

_NOT_THEIRS = (str(Path(__file__).parent) + os.sep, importlib.__file__, "<frozen importlib")


class UserError(ValueError):
    """Something the user gave cannot be used; the message says what, and what is possible.

    The command line prints it as one line and exits with status 2.
    """


class Parser(argparse.ArgumentParser):
    """A command's arguments, whose complaints are UserErrors too."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        name = self.prog.removeprefix("marlhf ")
        raise UserError(f"{name}: {message}; see {self.prog} --help")


def one_line(text: object, length: int = 300) -> str:
    """A text, or what an exception says, on one line of at most `length` characters."""
    words = " ".join(str(text).split())
    words = words or (type(text).__name__ if isinstance(text, BaseException) else "")
    return words if len(words) <= length else words[: length - 3] + "..."


def raised(error: BaseException) -> str:
    """What the code of a plug-in raised, and where: its name, what it says, and the last line of
    the file that this library called, as far as that is not its own."""
    text = f"raised {type(error).__name__}: {one_line(error)}"
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not frame.filename.startswith(_NOT_THEIRS)]
    if not theirs:
        return text
    line = next(f.lineno for f in reversed(theirs) if f.filename == theirs[0].filename)
    return f"{text} ({Path(theirs[0].filename).name}, line {line})"


_REQUIREMENTS = {
    "bool_type": "true or false",
    "dataclass_type": "a mapping of keys",
    "dict_type": "a mapping of keys",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "list_type": "a list",
    "none_required": "null",
    "string_too_short": "a text that is not empty",
    "string_type": "a text",
    "too_long": "a list of at most {max_length}",
    "too_short": "a list of at least {min_length}",
    "tuple_type": "a list",
}


def requirement(finding: Mapping[str, Any]) -> str:
    """What a value must be, by one of pydantic's findings, in the words of somebody who writes
    YAML."""
    template = _REQUIREMENTS.get(finding["type"])
    if template is None:
        return finding["msg"].removeprefix("Input should be ")
    bounds = finding.get("ctx", {}).items()
    whole = {n: int(x) if isinstance(x, float) and x.is_integer() else x for n, x in bounds}
    return template.format(**whole)
