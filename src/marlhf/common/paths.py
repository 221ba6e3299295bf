"""Checks of users' paths, and one-line errors for reads and writes that fail."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from marlhf.common.errors import UserError, one_line

_LONGEST_NAME = 255  # bytes, on every file system that runs are written to

_TRIAL_BYTES = 2**20
_BLOCK = 2**18  # bytes read at a time
_TORCH_WRITE_ERROR = re.compile("inline_container|PytorchStreamWriter")
_ERROR_NUMBER = re.compile(r"\(os error (\d+)\)")

_KINDS = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def path_fault(path: str) -> str | None:
    """The reason why a text cannot be a path, else None, without disk access."""
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
        raise ValueError(f"given {_quoted(path)}, {fault}")
    return path


def local_path(path: str | Path, key: str) -> Path:
    """Expand `~` in a path, and check that a file or folder there is readable.

    Raises UserError, naming `key`, for an invalid path, a loop of links, or missing permissions.
    """
    text = str(path)
    fault = path_fault(text)
    if fault is not None:
        raise UserError(f"{key}: given {_quoted(text)}, {fault}")
    expanded = Path(text).expanduser()
    with reading(key, text):
        try:
            mode = expanded.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            return expanded
        permissions = os.R_OK | os.X_OK if stat.S_ISDIR(mode) else os.R_OK
        if not os.access(expanded, permissions):
            raise PermissionError(13, os.strerror(13))
    return expanded


def model_path(path: str | Path, key: str) -> Path:
    """As `local_path`, for a model or its tokenizer, whose files need a UTF-8 name."""
    if any("\ud800" <= letter <= "\udfff" for letter in str(path)):
        shown = _quoted(str(path))
        raise UserError(f"{key}: given {shown}, which holds half of a character (is not UTF-8)")
    return local_path(path, key)


def text_file(path: str | Path, key: str, streams: bool = False) -> Path:
    """Check a path as `local_path` does, and refuse pipes and devices, which may not end.

    streams   accept a pipe that this process holds open, as a shell's `<(command)`

    Raises UserError, naming `key`.
    """
    file = local_path(path, key)
    if (kind := special_kind(file)) is not None and not (streams and _is_open_pipe(file)):
        raise UserError(f"{key}: given {_quoted(str(path))}, which is {kind}, must be a file")
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
        raise UserError(f"{key}: cannot read {_quoted(str(where))}: {reason}") from None


@contextmanager
def writing(key: str, folder: str | Path, advice: str = "") -> Iterator[None]:
    """Wrap writes below `folder`: a refusal of the system becomes a one-line UserError.

    advice   the end of that line: what is complete, and how to resume
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = _refusal(error, Path(folder))
        if reason is None:
            raise
        line = f"{key}: cannot write in {_quoted(str(folder))}: {reason}{advice}"
        raise UserError(line) from error


def _refusal(error: Exception, folder: Path) -> str | None:
    """The system's reason for a failed write; None for any other error.

    safetensors and tokenizers have the error's number in their message. torch raises different
    errors on a full disk; a check of free space and a small trial write replace them.
    """
    number = getattr(error, "errno", None)
    if number is None and (match := _ERROR_NUMBER.search(one_line(error, 4000))):
        number = int(match[1])
    if number is None and isinstance(error, RuntimeError):
        number = _try_to_write(folder)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full"
    if isinstance(error, OSError):
        return one_line(error)
    if number is not None:
        return os.strerror(number)
    return one_line(error) if _TORCH_WRITE_ERROR.search(str(error)) else None


def _try_to_write(folder: Path) -> int | None:
    """The error number of a small trial write below `folder`; None if it succeeds."""
    try:
        if shutil.disk_usage(folder).free < _TRIAL_BYTES:
            return errno.ENOSPC
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_TRIAL_BYTES))
    except OSError as error:
        return error.errno
    return None


def write_atomically(path: Path, text: str) -> None:
    """Write a text file atomically: never half of it, even on a full disk.

    Raises OSError.
    """
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # it may be a link or a pipe
    try:
        partial.write_text(text, encoding="utf-8", newline="")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)  # frees space on a full disk
        raise


def check_kinds(paths: Iterable[Path], key: str) -> None:
    """Check that a job's outputs are absent, or files; names without suffix: folders.

    Raises UserError, naming `key`: a pipe would block the job, and a folder would end it late.
    """
    for path in paths:
        is_file = bool(Path(path.name.removesuffix(".partial")).suffix)
        if os.path.lexists(path) and not (path.is_file() if is_file else path.is_dir()):
            kind = "a file" if is_file else "a folder"
            raise UserError(f"{key}: {_quoted(str(path))} is not {kind}; move it away")


def special_kind(path: Path) -> str | None:
    """The kind of a special file, such as "a named pipe"; else None."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return None
    return next((name for test, name in _KINDS if test(mode)), None)


def _is_open_pipe(path: Path) -> bool:
    """Whether a path names an open pipe of this process, such as a shell's `<(command)`."""
    is_open = str(path).startswith(("/dev/fd/", "/proc/self/fd/")) or str(path) == "/dev/stdin"
    return is_open and path.is_fifo()


def _quoted(path: str) -> str:
    return one_line(repr(path), 120)


def digest_of_file(file: Path) -> str:
    """SHA-256 of a file's content, as hexadecimal digits. Raises OSError."""
    digest = hashlib.sha256()
    with file.open("rb") as data:
        while block := data.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
