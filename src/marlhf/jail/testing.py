"""A test's end of the conversation with a program, and which of its exceptions the test wants.

An exception of the program is an answer where the test wants one there, and else what the program
stopped with, even if the test forgives it. Which of the two it is shows when the test runs again
on the recorded replies, with that exception replaced: a test that comes to the same end both with
an exception of a class that nobody knows and with some value has not asked for this one.
"""

from __future__ import annotations

import inspect
import json
import os
import random
import types
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from marlhf.jail.peer import Peer

PROGRAM_GONE = 64
_RECORDED = 1 << 25  # characters kept of a conversation
_EXTRA_REQUESTS = 1000  # of a test run again, which might ask for ever

Site = tuple[tuple[str, int], ...]


class Tester(Peer):
    """The test's end; it keeps the conversation, and where the program raised."""

    def __init__(self, reader: Any, writer: Any) -> None:
        super().__init__(reader, writer, believes=False)
        self.recorded: dict[str, list[list[str]]] = {}
        self._said: list[str] = []
        self.size = 0
        self.raised: list[Exception] = []
        self.sites: dict[Site, None] = {}

    def gone(self, error: BaseException) -> NoReturn:
        """End here and now, where no `except` or `finally` of the test can go on."""
        os._exit(PROGRAM_GONE)

    def crossed(self, error: Exception, action: str) -> Exception:
        if not _is_end(error, action):
            self.raised.append(error)
            self.sites[_site()] = None
        return error

    def converse(self, request: dict[str, Any]) -> dict[str, Any]:
        outer, self._said = self._said, []
        key = json.dumps(request)
        self.size += len(key)
        self.recorded.setdefault(key, []).append(self._said)
        reply = super().converse(request)
        self._said = outer
        return reply

    def line(self) -> str:
        line = super().line()
        self.size += len(line)
        if self.size <= _RECORDED:
            self._said.append(line)
        return line


class Again(Peer):
    """A conversation as it was, but for what the program raised at one place of the test.

    raising, or else the value `instead`, stands in for it, and for what was never asked.
    """

    def __init__(self, first: Tester, site: Site, raising: bool, instead: Any = None) -> None:
        super().__init__(first.reader, first.writer, believes=False)
        self.replies = {key: deque(said) for key, said in first.recorded.items()}
        self.left = sum(map(len, self.replies.values())) + _EXTRA_REQUESTS
        self.site, self.raising, self.instead = site, raising, instead

    def ask(self, action: str, number: int, *arguments: Any, **keywords: Any) -> Any:
        self.left -= 1
        try:
            return super().ask(action, number, *arguments, **keywords)
        except Exception as error:
            here = _site() == self.site and not _is_end(error, action)
            if not (here or isinstance(error, _UnaskedError)):
                raise
        if self.raising or self.left < 0:
            raise UnknownError
        return self.instead

    def gone(self, error: BaseException) -> NoReturn:
        """Nothing is there to be gone; `ask` raises what it has."""
        raise _UnaskedError from None

    def converse(self, request: dict[str, Any]) -> dict[str, Any]:
        for line in self.replies[json.dumps(request)].popleft():
            message = json.loads(line)
            if "do" not in message:
                return message
            self.answer(message)
        raise KeyError


class _UnaskedError(Exception):
    """The recorded conversation has no such request."""


class UnknownError(Exception):
    """An exception that no test can be waiting for."""


def _is_end(error: Exception, action: str) -> bool:
    """Whether an exception only says that an iterator has no more."""
    return action in ("next", "send") and isinstance(error, StopIteration)


def _site() -> Site:
    """Where the test asks: the lines of its frames."""
    frame, lines = inspect.currentframe(), []
    while frame is not None:
        if not frame.f_code.co_filename.startswith(__file__.rpartition(os.sep)[0]):
            lines.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    return tuple(lines)


def run_test(
    codes: list[types.CodeType],
    function: str,
    peer: Peer,
    names: Callable[[], dict[str, Any]],
    found: Callable[[], Any] = lambda: None,
) -> BaseException | None:
    """Define a test in fresh names and run it; None where it passes, else what it raises.

    found: called when the test is known to be one.
    """

    def candidate(*arguments: Any, **keywords: Any) -> Any:
        return peer.ask("call", 0, *arguments, **keywords)

    fresh = names()
    peer.classes = fresh
    for code in codes:
        exec(code, fresh)
    fresh[function] = candidate
    check = fresh["check"]
    found()
    try:
        check(candidate)
    except SystemExit as end:
        return end if end.code else None
    except BaseException as error:
        return error
    return None


def stopped_by_program(error: BaseException | None, tester: Tester) -> bool:
    """Whether a test was ended by what the program raised, or while it dealt with that."""
    seen = set()
    while error is not None and id(error) not in seen:
        if any(error is one for one in tester.raised):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def forgives(tester: Tester, end: BaseException | None, run: Callable[[Peer], Any]) -> bool:
    """Whether a test that ended so has passed over an exception that it did not want.

    run: runs the test again on another conversation.
    """
    if not tester.sites:
        return False
    if tester.size > _RECORDED:  # it cannot be told
        return True

    def same(again: Again) -> bool:
        other = run(again)
        return again.left >= 0 and _mark(other) == _mark(end)

    return any(
        same(Again(tester, site, raising=True))
        and any(same(Again(tester, site, False, instead)) for instead in _anything())
        for site in tester.sites
    )


def _mark(end: BaseException | None) -> Any:
    """How and where a test ended."""
    lines = []
    traceback = None if end is None else end.__traceback__
    while traceback is not None:
        lines.append((traceback.tb_frame.f_code.co_filename, traceback.tb_lineno))
        traceback = traceback.tb_next
    return None if end is None else (type(end).__name__, lines)


def _agreeable(base: type, truth: bool) -> Any:
    """A value that agrees with all that a test may hold against it."""
    yes = dict.fromkeys(("eq", "lt", "le", "gt", "ge", "contains"), lambda *_: True)
    itself = dict.fromkeys(
        (
            *("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "mod", "rmod"),
            *("floordiv", "rfloordiv", "pow", "rpow", "and", "or", "xor", "neg", "pos", "abs"),
            *("round", "getitem", "getattr", "call"),
        ),
        lambda self, *_, **__: self,
    )
    methods: dict[str, Any] = {f"__{name}__": do for name, do in (yes | itself).items()}
    methods |= {"__ne__": lambda *_: not truth, "__hash__": lambda _: 0}
    if base is object:
        methods |= {"__iter__": lambda _: iter(()), "__float__": lambda _: 0.0}
        methods |= dict.fromkeys(("__len__", "__int__", "__index__"), lambda _: 0)
    methods["__bool__"] = lambda _: truth
    return type("Agreeable", (base,), methods)()


def _anything() -> Iterator[Any]:
    """Values of which a test that takes some value takes one."""
    bases = (object, int, float, str, list, tuple, dict, set)
    yield from (_agreeable(base, truth) for truth in (True, False) for base in bases)
    yield from (None, True, False)


def repeatable(run: Callable[[Peer], Any]) -> Callable[[Peer], Any]:
    """Have each run of a test draw the same random numbers."""
    state = random.getstate()

    def seeded(peer: Peer) -> Any:
        random.setstate(state)
        return run(peer)

    return seeded
