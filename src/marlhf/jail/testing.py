"""A test's end of the conversation, and checks that its verdict depends on correct answers.

An exception of the program is an answer if the test expects one there; otherwise the program failed
with it, even if the test catches it. To tell these apart the test is replayed on the recorded
replies with that exception replaced: a test that ends alike with an exception of an unknown class
and with some value did not expect this exception.

A test is also replayed without the replies of objects that it had passed a value to: a test of a
function that then ends differently has taken an object's word for it.
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

from marlhf.jail.lent import ALWAYS, NEVER, OWN_ONLY, Lent, number_of
from marlhf.jail.peer import Peer
from marlhf.jail.values import Opaque

PROGRAM_GONE = 64
_RECORDED = 1 << 25  # characters kept of a conversation
_EXTRA_REQUESTS = 1000  # of a replayed test, which might otherwise ask forever

# requests that pass no value of the test to an object that could agree with it
_TELLS_NOTHING = (
    "meet",
    "getattr",
    "setattr",
    "delattr",
    "send",
    "throw",
    "__format__",
    "__round__",
)

Site = tuple[tuple[str, int], ...]


class _End(Peer):
    """A test's end of a conversation, live or recorded.

    is_class: whether the problem asks for a class; then operators of its instances and methods of
        the program's objects are tested. Otherwise an answer is judged by its attributes, items and
        converted value, and not by whether it agrees with a value passed to it.
    """

    def __init__(self, reader: Any, writer: Any, is_class: bool) -> None:
        super().__init__(reader, writer, trusts_other=False)
        self.is_class = is_class
        self.trust = OWN_ONLY if is_class else NEVER
        self._attributes: set[int] = set()  # numbers of the objects that are attributes of others

    def ask(self, action: str, number: int, *arguments: Any, **keywords: Any) -> Any:
        value = super().ask(action, number, *arguments, **keywords)
        if self.is_class:
            made = action == "__call__" and number == 0 and isinstance(value, Lent)
            return self.with_trust(value, ALWAYS) if made else value
        if action == "getattr" and isinstance(value, Lent):
            self._attributes.add(number_of(value))
        elif action == "getattr" and callable(value):
            return Opaque()  # for example `bool`, which agrees with nearly everything
        return value

    def tells(self, action: str, number: int, arguments: Any, keywords: Any) -> bool:
        """Whether a request passes a test's value to an object that could agree with it.

        Calling a function that is itself an answer, alone or in a container, is the test's purpose.
        """
        if self.is_class or action in _TELLS_NOTHING or not (arguments or keywords):
            return False
        return action != "__call__" or number in self._attributes


class Tester(_End):
    """The test's live end; records the conversation, and where the program raised."""

    def __init__(self, reader: Any, writer: Any, is_class: bool = False) -> None:
        super().__init__(reader, writer, is_class)
        self.recorded: dict[str, list[list[str]]] = {}
        self._lines: list[str] = []
        self.size = 0
        self.raised: list[Exception] = []
        self.sites: dict[Site, bool] = {}  # -> whether an exception there could end an iteration
        self.has_told = False

    def gone(self, error: BaseException) -> NoReturn:
        """Exit at once, so that no `except` or `finally` of the test runs."""
        os._exit(PROGRAM_GONE)

    def ask(self, action: str, number: int, *arguments: Any, **keywords: Any) -> Any:
        self.has_told |= self.tells(action, number, arguments, keywords)
        return super().ask(action, number, *arguments, **keywords)

    def crossed(self, error: Exception, action: str) -> Exception:
        if not _is_end(error, action):
            self.raised.append(error)
            ends = isinstance(error, StopIteration | StopAsyncIteration)
            self.sites[_site()] = ends or self.sites.get(_site(), False)
        return error

    def converse(self, request: dict[str, Any]) -> dict[str, Any]:
        outer, self._lines = self._lines, []
        key = json.dumps(request)
        self.size += len(key)
        self.recorded.setdefault(key, []).append(self._lines)
        reply = super().converse(request)
        self._lines = outer
        return reply

    def line(self) -> str:
        line = super().line()
        self.size += len(line)
        if self.size <= _RECORDED:
            self._lines.append(line)
        return line


class Replay(_End):
    """A conversation replayed from the recorded replies."""

    def __init__(self, first: Tester) -> None:
        super().__init__(first.reader, first.writer, first.is_class)
        self.replies = {key: deque(recorded) for key, recorded in first.recorded.items()}
        self.left = sum(map(len, self.replies.values())) + _EXTRA_REQUESTS

    def gone(self, error: BaseException) -> NoReturn:
        """Raise: there is no process that could be gone."""
        raise _UnrecordedError from None

    def converse(self, request: dict[str, Any]) -> dict[str, Any]:
        for line in self.replies[json.dumps(request)].popleft():
            message = json.loads(line)
            if "do" not in message:
                return message
            self.answer(message)
        raise KeyError


class Replaced(Replay):
    """A replay with the program's exception at one site of the test replaced.

    raising: replace it by an UnknownError, else by the value `instead`; as are replies to requests
        that were not recorded.
    """

    def __init__(self, first: Tester, site: Site, raising: bool, instead: Any = None) -> None:
        super().__init__(first)
        self.site, self.raising, self.instead = site, raising, instead

    def ask(self, action: str, number: int, *arguments: Any, **keywords: Any) -> Any:
        self.left -= 1
        try:
            return super().ask(action, number, *arguments, **keywords)
        except Exception as error:
            is_site = _site() == self.site and not _is_end(error, action)
            if not (is_site or isinstance(error, _UnrecordedError)):
                raise
        if self.raising or self.left < 0:
            raise UnknownError
        return self.instead


class WithoutAgreement(Replay):
    """A replay without the replies of objects that received a value of the test.

    Such a reply is replaced by a value that equals nothing and whose truth is `truth`; an item is
    replaced by an equal value of the opposite truth.
    """

    def __init__(self, first: Tester, truth: bool) -> None:
        super().__init__(first)
        self.truth = truth

    def ask(self, action: str, number: int, *arguments: Any, **keywords: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise UnknownError
        value = super().ask(action, number, *arguments, **keywords)
        if not self.tells(action, number, arguments, keywords):
            return value
        return self._negated(value) if action == "__getitem__" else _Nothing(self.truth)

    def _negated(self, value: Any) -> Any:
        """An equal value of the opposite truth; `_Nothing` if there can be none."""
        kind: Any = type(value)
        try:
            truth = not value
        except _UnrecordedError:  # nor did the test ask
            return value
        try:
            made = type(kind.__name__, (kind,), {"__slots__": (), "__bool__": lambda _: truth})
            return made(self, number_of(value)) if isinstance(value, Lent) else made(value)
        except TypeError:  # for example, `bool` has no subclasses
            return _Nothing(self.truth)


class _Nothing(Opaque):
    """A value that equals nothing, with a given truth."""

    def __init__(self, truth: bool) -> None:
        self.truth = truth

    def __bool__(self) -> bool:
        return self.truth


class _UnrecordedError(Exception):
    """The recorded conversation has no such request."""


class UnknownError(Exception):
    """An exception that no test can expect."""


def _is_end(error: Exception, action: str) -> bool:
    """Whether an exception is the end of an iteration, or an absent attribute."""
    if action in ("getattr", "delattr"):
        return isinstance(error, AttributeError)
    is_end = isinstance(error, StopIteration | StopAsyncIteration)
    return is_end and action in ("__next__", "send", "throw", "await")


def _site() -> Site:
    """The position in the test from which it asks: files and lines of its frames."""
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
    loaded: Callable[[], Any] = lambda: None,
) -> BaseException | None:
    """Run a test in a new namespace; returns its exception, None if it passes.

    names: makes the namespace.
    loaded: called once the test has been defined.
    """
    fresh = names()
    for code in codes:
        exec(code, fresh)
    candidate = fresh[function] = peer.proxy(0, function, ["__call__"], is_class=True)
    check = fresh["check"]
    loaded()
    peer.classes = fresh
    peer.meet()
    try:
        check(candidate)
    except SystemExit as end:
        return end if end.code else None
    except BaseException as error:
        return error
    return None


def stopped_by_program(error: BaseException | None, tester: Tester) -> bool:
    """Whether a test ended by an exception of the program, or while handling one."""
    seen = set()
    while error is not None and id(error) not in seen:
        if any(error is raised for raised in tester.raised):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def forgives(tester: Tester, end: BaseException | None, run: Callable[[Peer], Any]) -> bool:
    """Whether a test that ended with `end` ignored an exception that it did not expect.

    run: runs the test on another conversation.
    """
    if not tester.sites:
        return False
    if tester.size > _RECORDED:  # cannot be replayed
        return True
    # `map` and the like swallow a StopIteration that no test expects, and no other exception
    return any(
        (ends or _same(Replaced(tester, site, raising=True), end, run))
        and any(
            _same(Replaced(tester, site, raising=False, instead=x), end, run) for x in _anything()
        )
        for site, ends in tester.sites.items()
    )


def takes_its_word(tester: Tester, run: Callable[[Peer], Any]) -> bool:
    """Whether a test passes only because an object says that it equals the right answer.

    run: runs the test on another conversation.
    """
    if not tester.has_told:
        return False
    truths = (True, False)
    if tester.size > _RECORDED:  # cannot be replayed
        return True
    return not all(_same(WithoutAgreement(tester, truth), None, run) for truth in truths)


def _same(replay: Replay, end: BaseException | None, run: Callable[[Peer], Any]) -> bool:
    """Whether a replayed test ends as the live one did."""
    end_of_replay = run(replay)
    return replay.left >= 0 and _trace(end_of_replay) == _trace(end)


def _trace(end: BaseException | None) -> Any:
    """Class of a test's exception, and the lines that raised it."""
    lines = []
    traceback = None if end is None else end.__traceback__
    while traceback is not None:
        lines.append((traceback.tb_frame.f_code.co_filename, traceback.tb_lineno))
        traceback = traceback.tb_next
    return None if end is None else (type(end).__name__, lines)


def _agreeable(base: type, truth: bool) -> Any:
    """A value whose comparisons all hold."""
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
    """Values one of which passes any test that some value passes."""
    bases = (object, int, float, str, list, tuple, dict, set)
    yield from (_agreeable(base, truth) for truth in (True, False) for base in bases)
    yield from (None, True, False)


def repeatable(run: Callable[[Peer], Any]) -> Callable[[Peer], Any]:
    """A `run` that starts from the same random state each time."""
    state = random.getstate()

    def seeded(peer: Peer) -> Any:
        random.setstate(state)
        return run(peer)

    return seeded
