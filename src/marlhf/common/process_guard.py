"""Keeps plug-ins from ending the process, and from closing its stdout and stderr.

What ends a process below Python, as a C library's `exit`, cannot be caught.
"""

from __future__ import annotations

import fcntl
import os
import posix
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

_ENDS = {name: getattr(os, name) for name in ("_exit", "execv", "execve")}  # as Python has them
_STREAMS = {1: "stdout", 2: "stderr"}
_HIGH = (512, 64, 3)  # descriptors above those that programs close by number


class _Calls:
    """Counts plug-ins' calls under way; `os._exit` and `os.exec*` are replaced while there are."""

    def __init__(self) -> None:
        self.count, self.process = 0, 0
        self.lock = threading.Lock()

    def add(self, change: int) -> None:
        with self.lock:
            self.count += change
            self.process = os.getpid()
            for module in (os, posix) if self.count == max(change, 0) else ():
                for name, end in _ENDS.items():
                    setattr(module, name, _refusing(name, end) if self.count else end)


_CALLS = _Calls()


def _refusing(name: str, end: Callable[..., Any]) -> Callable[..., Any]:
    def refuse(*arguments: Any, **more: Any) -> Any:
        if os.getpid() == _CALLS.process:
            raise SystemExit(f"os.{name}({', '.join(map(repr, arguments))})")
        return end(*arguments, **more)  # a process that a plug-in has forked

    return refuse


@contextmanager
def not_ended() -> Iterator[None]:
    """Raise SystemExit where this process calls `os._exit` or `os.exec*`, in any thread."""
    _CALLS.add(1)
    try:
        yield
    finally:
        _CALLS.add(-1)


def open_streams() -> None:
    """Open the standard streams that are closed on the null device.

    Else the next files that a job opens, such as its metrics, would take their numbers, and with
    them what C libraries print.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if not _is_there(number):
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, _opened(number))


@contextmanager
def streams_kept() -> Iterator[list[str]]:
    """Restore stdout and stderr, Python's streams and their file descriptors.

    Yields a list that holds, after the context, the names of those that were closed within it.
    """
    copies: dict[int, int] = {}
    for number in filter(_is_there, _STREAMS):
        copies[number] = _copy(number)
    were_open = [name for name in _STREAMS.values() if _is_open(getattr(sys, name))]
    closed: list[str] = []
    try:
        yield closed
    finally:
        for number, copy in copies.items():
            if not _is_there(number):
                closed.append(_STREAMS[number])
            with suppress(OSError):  # the copy was closed too
                if not (_is_there(number) and os.path.samestat(os.fstat(number), os.fstat(copy))):
                    os.dup2(copy, number)
                os.close(copy)
        for number, name in _STREAMS.items():
            if name in were_open and not _is_open(stream := getattr(sys, name)):
                closed += [] if name in closed else [name]
                if _is_there(number):
                    setattr(sys, name, _reopened(number, stream))


def _copy(number: int) -> int:
    for lowest in _HIGH:
        with suppress(OSError):  # beyond the limit on open files
            return fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, lowest)
    return -1


def _is_open(stream: Any) -> bool:
    return stream is not None and not getattr(stream, "closed", False)


def _is_there(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _opened(number: int) -> Any:
    return open(number, "w" if number else "r", encoding="utf-8", errors="replace", closefd=False)


def _reopened(number: int, stream: Any) -> Any:
    """A stream like one that was closed, on a descriptor that stays open with it."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return open(number, "w", buffering=1, encoding=encoding, errors="replace", closefd=False)
