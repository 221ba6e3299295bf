"""The first process of a jail: runs a program, or tests one in another jail.

A program under test is run by one of

    run_script    reads stdin, writes stdout, as `python program.py` would
    serve_calls   answers calls of one of its functions, one line of JSON each
    serve_check   answers requests of a test in another jail (see `marlhf.jail.peer`)

and `run_check` runs the test in that other jail, where the program cannot reach it: data and
proxies are exchanged (see `marlhf.jail.lent`), so that no object of the program decides whether it
is right, except instances of a class that the problem asks for.
Each first writes marks to stderr, before any code of the program runs, that cannot be taken back.
"""

from __future__ import annotations

import atexit
import functools
import json
import linecache
import os
import sys
import threading
import traceback
import types
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any

from marlhf.jail.lent import TEST_FILES
from marlhf.jail.peer import Peer
from marlhf.jail.testing import (
    Tester,
    forgives,
    repeatable,
    run_test,
    stopped_by_program,
    takes_its_word,
)
from marlhf.jail.values import decode, encode

READY, COMPILED = b"R", b"C"
ERROR = 1  # exit status of a program that fails
# exit status of run_check, in addition to PROGRAM_GONE; other than a test's own
PASSED, FAILED, RAISED, TESTS_BROKEN = 60, 61, 62, 63


def run_script(source: str, in_fd: int, out_fd: int, err_fd: int) -> None:
    """Run a program as `__main__`. Does not return."""
    _use_streams(in_fd, out_fd, err_fd)
    code = _compile(source, "program.py")
    os.write(2, COMPILED)
    _finish(lambda: exec(code, _module("__main__")))


def serve_calls(
    source: str, function: str, prelude: str, in_fd: int, out_fd: int, err_fd: int
) -> None:
    """Run a program, then answer each line `[arguments, keywords]` with its function's result.

    The function is one of the program or a method of its class `Solution`. The program runs after
    the code `prelude`, and as if imported: code under `__name__ == "__main__"` does not run.
    Does not return.
    """
    requests, replies = _talk(in_fd, out_fd, err_fd)

    def serve(names: dict[str, Any]) -> None:
        target = _find(names, function)
        for line in requests:
            arguments, keywords = decode(json.loads(line))
            print(json.dumps(encode(target(*arguments, **keywords))), file=replies, flush=True)

    _serve(source, prelude, serve)


def serve_check(source: str, function: str, in_fd: int, out_fd: int, err_fd: int) -> None:
    """Run a program as `serve_calls` does, and answer its test's requests. Does not return."""
    peer = Peer(*_talk(in_fd, out_fd, err_fd), trusts_other=True)

    def serve(names: dict[str, Any]) -> None:
        peer.classes = names
        peer.print_to_other()
        peer.serve(_find(names, function))

    _serve(source, "", serve)


def run_check(
    test: str, helpers: str, function: str, is_class: bool, in_fd: int, out_fd: int, err_fd: int
) -> None:
    """Run `check(candidate)` of a test in HumanEval's format on a program in another jail.

    helpers: code of the problem, for tests that use its other functions.
    is_class: whether the problem asks for a class; then its operators are tested too.

    Does not return; exits with PASSED; FAILED; RAISED where an exception of the program ended the
    test or should have; PROGRAM_GONE as soon as the program does not answer; or TESTS_BROKEN where
    the test itself cannot run.
    """
    tester = Tester(*_talk(in_fd, out_fd, err_fd), is_class)
    texts = zip((helpers, test), TEST_FILES, strict=True)
    codes = [_compile(text, name) for text, name in texts]
    os.write(2, COMPILED)
    status = TESTS_BROKEN

    def loaded() -> None:
        nonlocal status
        status = FAILED
        tester.ask("ping", 0)  # answered once the program is loaded

    run = repeatable(lambda peer: run_test(codes, function, peer, names, loaded))
    names = functools.partial(_module, "__main__")
    again = repeatable(lambda peer: run_test(codes, function, peer, names))
    try:
        end = run(tester)
        tester.ask("ping", 0)  # the program is still alive after the test
        status = RAISED
        _report(end or (tester.raised[-1] if tester.raised else None))
        if not stopped_by_program(end, tester) and not forgives(tester, end, again):
            status = FAILED if end is not None or takes_its_word(tester, again) else PASSED
    except BaseException as error:
        _report(error)
    os._exit(status)


def _talk(in_fd: int, out_fd: int, err_fd: int) -> tuple[IO[str], IO[str]]:
    """Reader and writer of a conversation; stdin and stdout become the null device."""
    reader, writer = os.fdopen(in_fd, encoding="utf-8"), os.fdopen(out_fd, "w", encoding="utf-8")
    null = os.open(os.devnull, os.O_RDWR)
    _use_streams(null, null, err_fd)
    return reader, writer


def _serve(source: str, prelude: str, serve: Callable[[dict[str, Any]], None]) -> None:
    """Run a program as a module, and then `serve` on its names."""
    code = _compile(source, "program.py")
    os.write(2, COMPILED)

    def run() -> None:
        names = _module("program")
        exec(prelude, names)
        exec(code, names)
        serve(names)

    _finish(run)


def _use_streams(in_fd: int, out_fd: int, err_fd: int) -> None:
    """Make these files stdin, stdout and stderr, and mark the jail as ready."""
    for target, fd in enumerate((in_fd, out_fd, err_fd)):
        os.dup2(fd, target)
    sys.stdin = sys.__stdin__ = os.fdopen(0, encoding="utf-8")
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", encoding="utf-8", errors="replace")
    os.write(2, READY)


def _compile(source: str, name: str) -> types.CodeType:
    source = source.removeprefix("\ufeff")  # a byte order mark, as in a file
    lines = source.splitlines(keepends=True)
    linecache.cache[name] = len(source), None, lines, name  # for tracebacks and `inspect`
    try:
        return compile(source, name, "exec", dont_inherit=True)
    except BaseException as error:
        _report(error)
        os._exit(ERROR)


def _module(name: str) -> dict[str, Any]:
    """The names of a new module, which replaces the server's `__main__`."""
    module = types.ModuleType(name)
    module.__file__ = os.path.abspath("program.py")
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
    """Run, then exit as Python does: join threads, call exit functions, flush output."""
    status = ERROR
    try:
        run()
        status = 0
    except SystemExit as end:
        status = ERROR if end.code else 0
        if isinstance(end.code, str):
            _report(end)
    except BaseException as error:
        _report(error)
    try:
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        # private: atexit._run_exitfuncs (CPython 3.10 to 3.13)
        # why: a jail is forked within the server's frames and ends by os._exit, which calls none
        # remove when: Python has a public call of the registered exit functions
        atexit._run_exitfuncs()
        _flush(sys.stdout)
    except BaseException as error:
        status = ERROR
        _report(error)
    os._exit(status)


def _flush(stream: IO[str] | None) -> None:
    if stream is not None and not stream.closed:
        stream.flush()


def _report(error: BaseException | None) -> None:
    """Write an exception's traceback to stderr; never raises, whatever the exception is."""
    if error is None:
        return
    with suppress(BaseException):
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__, -3))
        os.write(2, text[-2000:].encode("utf-8", "replace"))
