"""Checks of paths that users give, and one-line errors for reads and writes that fail."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from marlhf.common.errors import UserError, one_line

_LONGEST_NAME = 255  # bytes, on every file system that runs are written to

_LITTLE = 2**20  # bytes
_OF_TORCH = re.compile("inline_container|PytorchStreamWriter")
_IN_WORDS = re.compile(r"\(os error (\d+)\)")

_KINDS = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def path_fault(path: str) -> str | None:
    """Why a text cannot be a path, or None; does not access the disk."""
    if "\0" in path:
        return "which holds a null character, as no path can"
    try:
        names = os.fsencode(path).split(os.sep.encode())
        Path(path).expanduser()
    except UnicodeEncodeError:
        return "which holds half of a character (a lone surrogate)"
    except RuntimeError:
        return "whose ~ names no user with a home folder"
    if max(map(len, names)) > _LONGEST_NAME:
        return f"which is no path: a name has at most {_LONGEST_NAME} bytes"
    return None


def checked_path(path: str) -> str:
    """The text itself, if it can be a path. Raises ValueError, for pydantic to name the key."""
    fault = path_fault(path)
    if fault is not None:
        raise ValueError(f"given {_shown(path)}, {fault}")
    return path


def local_path(path: str | Path, key: str) -> Path:
    """Expand `~` in a path; a file or folder that exists there is readable.

    Raises UserError, naming `key`, for an invalid path, a loop of links, or missing permissions.
    """
    text = str(path)
    fault = path_fault(text)
    if fault is not None:
        raise UserError(f"{key}: given {_shown(text)}, {fault}")
    found = Path(text).expanduser()
    with reading(key, text):
        try:
            mode = found.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            return found
        wanted = os.R_OK | os.X_OK if stat.S_ISDIR(mode) else os.R_OK
        if not os.access(found, wanted):
            raise PermissionError(13, os.strerror(13))
    return found


def text_file(path: str | Path, key: str) -> Path:
    """As `local_path`, but refuses pipes and devices, as they may have no end.

    Raises UserError, naming `key`.
    """
    file = local_path(path, key)
    if (kind := special_kind(file)) is not None:
        raise UserError(f"{key}: given {_shown(str(path))}, which is {kind}, must be a file")
    return file


@contextmanager
def reading(key: str, path: str | Path) -> Iterator[None]:
    """Wrap reads below `path`: an OSError becomes a one-line UserError."""
    try:
        yield
    except OSError as error:
        inside = error.filename
        where = inside if isinstance(inside, str) and inside != str(path) else path
        reason = error.strerror or one_line(error)
        raise UserError(f"{key}: cannot read {_shown(str(where))}: {reason}") from None


@contextmanager
def writing(key: str, folder: str | Path, advice: str = "") -> Iterator[None]:
    """Wrap writes below `folder`: what the system refuses becomes a one-line UserError.

    advice   the end of that line: what is still there, and how to resume
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        why = _refusal(error, Path(folder))
        if why is None:
            raise
        raise UserError(f"{key}: cannot write in {_shown(str(folder))}: {why}{advice}") from error


def _refusal(error: Exception, folder: Path) -> str | None:
    """The system's reason for a failed write; None for any other error.

    safetensors and tokenizers give the error's number in their message. torch raises different
    errors on a full disk; free space and a small write are tried instead.
    """
    number = getattr(error, "errno", None)
    if number is None and (told := _IN_WORDS.search(one_line(error, 4000))):
        number = int(told[1])
    if number is None and isinstance(error, RuntimeError):
        number = _tried(folder)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full"
    if isinstance(error, OSError):
        return one_line(error)
    if number is not None:
        return os.strerror(number)
    return one_line(error) if _OF_TORCH.search(str(error)) else None


def _tried(folder: Path) -> int | None:
    """The error number of a small trial write below `folder`; None if it succeeds."""
    try:
        if shutil.disk_usage(folder).free < _LITTLE:
            return errno.ENOSPC
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_LITTLE))
    except OSError as error:
        return error.errno
    return None


def write_whole(path: Path, text: str) -> None:
    """Write a text file atomically: never half of it, even on a full disk.

    Raises OSError.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8", newline="")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)  # frees space on a full disk
        raise


def special_kind(path: Path) -> str | None:
    """The kind of a special file, such as "a named pipe"; else None."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return None
    return next((name for test, name in _KINDS if test(mode)), None)


def _shown(path: str) -> str:
    return one_line(repr(path), 120)
