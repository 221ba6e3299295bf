"""What the first process of a jail does: compile a program and run it, or test one from outside.

A program under test is played by one of

    run_script    reads stdin, writes stdout, as `python program.py` would
    serve_calls   answers calls of one of its functions, one line of JSON each

and `run_check` holds the tests of a problem in a jail of its own, where the program cannot reach
them: only plain data comes across, so that no object of the program takes part in a comparison.
Each first writes marks to stderr, before anything of the program has run, that it cannot take back.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import traceback
import types
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any

READY, COMPILED = b"R", b"C"
FAILED, TESTS_BROKEN, PROGRAM_GONE = 1, 3, 4  # how run_check ends; 0 where all tests pass
REPLY_LIMIT = 1 << 22


class ProgramGone(BaseException):
    """The program under test ended, or answered with something that is no answer."""


class Opaque:
    """Stands for a value that is no plain data, and equals nothing."""

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = object.__hash__


def encode(value: Any) -> Any:
    """A value in JSON's types; what is no plain data becomes a mark that decodes as `Opaque`."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, int):
        # JSON's decimal digits would take quadratic time, and Python limits their number
        return int(value) if abs(value) < 1 << 53 else {"int": hex(value)}
    if isinstance(value, list):
        return [encode(x) for x in value]
    if isinstance(value, tuple):
        return {"tuple": [encode(x) for x in value]}
    if isinstance(value, set | frozenset):
        return {"set": [encode(x) for x in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(k), encode(x)] for k, x in value.items()]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    return {"opaque": type(value).__name__}


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "int": lambda x: int(x, 16),
    "tuple": lambda x: tuple(decode(y) for y in x),
    "set": lambda x: {decode(y) for y in x},
    "dict": lambda x: {decode(k): decode(y) for k, y in x},
    "bytes": bytes.fromhex,
    "complex": lambda x: complex(*x),
    "opaque": lambda _: Opaque(),
}


def decode(value: Any) -> Any:
    """The inverse of `encode`. Raises ValueError for what `encode` does not write."""
    if isinstance(value, list):
        return [decode(x) for x in value]
    if isinstance(value, dict):
        try:
            ((kind, content),) = value.items()
            return _DECODERS[kind](content)
        except (AttributeError, KeyError, TypeError, OverflowError, ValueError) as error:
            raise ValueError(f"not an encoded value: {error}") from None
    return value


def run_script(source: str, in_fd: int, out_fd: int, err_fd: int) -> None:
    """Run a program as `__main__`. Does not return."""
    _use_streams(in_fd, out_fd, err_fd)
    code = _compile(source, "program.py")
    os.write(2, COMPILED)
    _finish(lambda: exec(code, _module("__main__")))


def serve_calls(
    source: str, function: str, prelude: str, in_fd: int, out_fd: int, err_fd: int
) -> None:
    """Run a program, then answer each line `[arguments, keywords]` with what its function returns.

    The function is the program's own, or a method of its class `Solution`. The program runs after
    the code `prelude` and as if imported: what it guards by `__name__ == "__main__"` does not run.
    Does not return.
    """
    requests, replies = os.fdopen(in_fd, encoding="utf-8"), os.fdopen(out_fd, "w", encoding="utf-8")
    null = os.open(os.devnull, os.O_RDWR)
    _use_streams(null, null, err_fd)
    code = _compile(source, "program.py")
    os.write(2, COMPILED)

    def serve() -> None:
        names = _module("program")
        exec(prelude, names)
        exec(code, names)
        target = _find(names, function)
        for line in requests:
            arguments, keywords = decode(json.loads(line))
            print(json.dumps(encode(target(*arguments, **keywords))), file=replies, flush=True)

    _finish(serve)


def run_check(test: str, helpers: str, function: str, in_fd: int, out_fd: int, err_fd: int) -> None:
    """Run `check(candidate)` of a test in HumanEval's format on a program in another jail.

    helpers: the code that the problem gives, for tests that use its other functions. Does not
    return; exits with 0, FAILED, PROGRAM_GONE, or TESTS_BROKEN where the test itself cannot run.
    """
    replies, requests = os.fdopen(in_fd, encoding="utf-8"), os.fdopen(out_fd, "w", encoding="utf-8")
    null = os.open(os.devnull, os.O_RDWR)
    _use_streams(null, null, err_fd)
    code = [_compile(text, name) for text, name in ((helpers, "prompt.py"), (test, "test.py"))]
    os.write(2, COMPILED)

    def candidate(*arguments: Any, **keywords: Any) -> Any:
        try:
            print(json.dumps(encode([arguments, keywords])), file=requests, flush=True)
            line = replies.readline(REPLY_LIMIT)
            if not line.endswith("\n"):
                raise ProgramGone
            return decode(json.loads(line))
        except (OSError, ValueError, RecursionError):
            raise ProgramGone from None

    status = TESTS_BROKEN
    try:
        names = _module("__main__")
        for each in code:
            exec(each, names)
        names[function] = candidate
        check = names["check"]
        status = FAILED
        check(candidate)
        status = 0
    except ProgramGone:
        status = PROGRAM_GONE
    except BaseException:
        _report()
    os._exit(status)


def _use_streams(in_fd: int, out_fd: int, err_fd: int) -> None:
    """Make these files stdin, stdout and stderr, and say that the jail is ready."""
    for target, fd in enumerate((in_fd, out_fd, err_fd)):
        os.dup2(fd, target)
    sys.stdin = sys.__stdin__ = os.fdopen(0, encoding="utf-8")
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", encoding="utf-8", errors="replace")
    os.write(2, READY)


def _compile(source: str, name: str) -> types.CodeType:
    try:
        return compile(source, name, "exec", dont_inherit=True)
    except BaseException:
        _report()
        os._exit(FAILED)


def _module(name: str) -> dict[str, Any]:
    """The names of a new module, which takes the place of the server's own `__main__`."""
    module = types.ModuleType(name)
    sys.modules["__main__"] = sys.modules[name] = module
    sys.argv = ["program.py"]
    return module.__dict__


def _find(names: dict[str, Any], function: str) -> Callable[..., Any]:
    if "Solution" in names and hasattr(names["Solution"], function):
        return getattr(names["Solution"](), function)
    if function not in names:
        raise NameError(f"the program has no function {function!r}")
    return names[function]


def _finish(run: Callable[[], None]) -> None:
    """Run and end as an interpreter does: threads joined, exit functions called, output written."""
    status = FAILED
    try:
        run()
        status = 0
    except SystemExit as end:
        status = FAILED if end.code else 0
        if isinstance(end.code, str):
            _report()
    except BaseException:
        _report()
    try:
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        atexit._run_exitfuncs()
        _flush(sys.stdout)
    except BaseException:
        status = FAILED
        _report()
    os._exit(status)


def _flush(stream: IO[str] | None) -> None:
    if stream is not None and not stream.closed:
        stream.flush()


def _report() -> None:
    """The traceback on stderr, whatever the program has done to it."""
    with suppress(BaseException):
        text = traceback.format_exc(limit=-3)
        os.write(2, text[-2000:].encode("utf-8", "replace"))
