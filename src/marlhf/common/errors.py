"""Errors that are reported as one line, and printable forms of foreign text."""

from __future__ import annotations

import argparse
import difflib
import functools
import importlib
import os
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

_NOT_PLUG_INS = (str(Path(__file__).parents[1]) + os.sep, importlib.__file__, "<frozen importlib")
_WRAPPERS = ("_contextlib.py", "contextlib.py")  # a decorator is not the cause

# Characters that control a terminal or reorder its text: C0, DEL, C1, bidi marks, surrogates.
_COMMANDS = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


class UserError(ValueError):
    """Invalid user input; the message has the fault, and what is possible.

    The command line prints it as one line and exits with status 2.
    """


class ReportedError(RuntimeError):
    """A failure that its message explains; the command line prints no traceback."""


class PeerError(ReportedError):
    """Another rank failed; the message says which and how."""


class Stopped(SystemExit):
    """The end of a process on a signal; no plug-in may swallow it."""


class Parser(argparse.ArgumentParser):
    """A command's argument parser, whose errors are UserErrors."""

    def __init__(self, **settings: Any) -> None:
        form = functools.partial(argparse.HelpFormatter, width=100)
        super().__init__(formatter_class=form, **settings)

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        name = self.prog.removeprefix("marlhf ")
        raise UserError(f"{name}: {message}; see {self.prog} --help")


def at_least_one(word: str) -> int:
    """Parse a command's argument: a whole number, at least 1. Raises ArgumentTypeError."""
    if not word.isdecimal() or not 1 <= int(word) < 2**31:
        raise argparse.ArgumentTypeError(f"given {word}, must be a whole number, at least 1")
    return int(word)


def printable(text: str, keep: str = "") -> str:
    """The text with � for control characters, bidi marks and surrogates not in `keep`.

    All foreign text passes through it before a terminal or a page displays it.
    """
    return _COMMANDS.sub(lambda match: match[0] if match[0] in keep else "�", text)


def say(text: object, file: TextIO | None = None) -> None:
    """Print lines for the user, with the terminal's control characters replaced.

    file   stderr by default, which may be a log on a full disk: that ends no job
    """
    try:
        print(printable(str(text), "\n\t"), file=file or sys.stderr, flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        if file is not None:
            raise


def one_line(text: object, length: int = 300) -> str:
    """A text, or an exception's message, as a printable line of at most `length` characters."""
    try:
        words = str(text)
    except Exception:  # the class is a plug-in's
        words = f"{type(text).__name__} (which cannot be shown)"
    words = printable(" ".join(words.split()))
    words = words or (type(text).__name__ if isinstance(text, BaseException) else "")
    return words if len(words) <= length else words[: length - 3] + "..."


def short_repr(value: object, length: int = 60) -> str:
    """`repr` of any value on a printable line of at most `length` characters."""
    try:
        return one_line(repr(value), length)
    except Exception:  # the class is a plug-in's
        return f"<{type(value).__name__}, which cannot be shown>"


def did_you_mean(name: str, possible: Sequence[str]) -> str:
    """A hint at the nearest name and a space; empty where none is near."""
    close = difflib.get_close_matches(name, possible, 1)
    return f"did you mean {close[0]!r}? " if close else ""


def raised(error: BaseException) -> str:
    """A plug-in's exception and the line that raised it, for messages.

    It has the exception's name and message, and the last line reached in the file that this library
    called, unless the library raised it.
    """
    text = f"raised {one_line(type(error).__name__)}: {one_line(error)}"
    frames = traceback.extract_tb(error.__traceback__)
    plug_in_frames = [
        frame
        for frame in frames
        if not frame.filename.startswith(_NOT_PLUG_INS)
        and Path(frame.filename).name not in _WRAPPERS
    ]
    if not plug_in_frames:
        return text
    file = plug_in_frames[0].filename
    line = next(frame.lineno for frame in reversed(plug_in_frames) if frame.filename == file)
    return f"{text} ({Path(file).name}, line {line})"


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
    """The requirement in one of pydantic's findings, worded for YAML users."""
    template = _REQUIREMENTS.get(finding["type"])
    if template is None:
        return finding["msg"].removeprefix("Input should be ")
    context = finding.get("ctx", {}).items()
    bounds = {n: int(x) if isinstance(x, float) and x.is_integer() else x for n, x in context}
    return template.format(**bounds)
